"""How fast a running tunnel is now: a generator on either side of it, and their agreement over the tunnel.

    wire       the agreement: lines of JSON, its version, its limits
    generator  TCP streams, UDP datagrams, echoes: what is sent, received and counted
    serve      the side that answers (`fasttun bench --serve`)
    measure    the side that asks, and the result as a document      plot    the document as a picture

Not for: comparing tunnels with each other (bench/ of the sources), nor for the tunnel itself: this is ordinary
traffic through it.
"""
