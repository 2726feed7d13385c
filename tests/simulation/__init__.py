"""A fleet in one thread and in no time: the real code of whole workers, on event loops, a network, a Redis and an
upstream that a test steps, cuts, loses and repeats at will, and can run again to the same end.

    loop.py      an event loop for each worker process; one that is not stepped is a process that is paused
    network.py   connections with latency, and what breaks, swallows and holds them
    server.py    the Redis commands that the project uses, with its real Lua scripts, replication with lag, restarts
    upstream.py  a stateful upstream that records each write to it and each execution, and links to it
    process.py   a worker process
    calls.py     clients, their sessions and calls
    replaced.py  what is put in place of the machine's clocks and randomness
    world.py     virtual time, and all of these together
    checker.py   what must hold at every instant, and of the history at the end
    steps.py     everything that a test may have happen, by numbers; and how a world comes to rest
    machine.py   the same as a Hypothesis state machine, and as schedules from a seed
"""
