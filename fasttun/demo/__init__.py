"""The demonstration behind `fasttun demo`: two hosts on this machine, a tunnel, a file through it.

hosts.py makes the hosts and serves the benchmarks, too; transfer.py is what runs inside them;
pure_python.py is the tunnel to compare with (in the source tree a link to bench/pure_python.py); display.py
shows how it goes; show.py is the order of events.
"""
