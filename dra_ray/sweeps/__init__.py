"""What a sweep decides, as pure functions of its settings and scores; Ray Tune drives them, nothing
here imports it.
"""
