"""One Ray driver each: train, train a teacher, synthesize, evaluate, sweep, and the quickstart."""
