"""The elastic teacher pool: Ray Serve replicas of a frozen teacher, shared by every trial, and the
client of a step.

Ray Serve starts, replaces, drains and removes the replicas. What is added here: a policy that
follows the measured work, retries of requests that died with their replica (Serve loses them), a
deadline, bounds on what is in flight, micro-batches shared by requests, answers shared by trials,
turns for clients, and the pool's own numbers. One application per teacher; the noise level travels
with each request, so one serves all.
"""
