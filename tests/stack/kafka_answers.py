"""Ends well once the broker on this port names a broker that clients may use. usage: kafka_answers.py PORT

An open port is less: the controller must have let the broker in first.
"""

import socket
import struct
import sys

METADATA, VERSION, NO_TOPICS = 3, 1, 0
request = struct.pack(">hhih", METADATA, VERSION, 1, -1) + struct.pack(">i", NO_TOPICS)
with socket.create_connection(("127.0.0.1", int(sys.argv[1])), timeout=2) as broker:
    broker.sendall(struct.pack(">i", len(request)) + request)
    answer = broker.makefile("rb").read(12)
_length, _correlation, n_brokers = struct.unpack(">iii", answer)
sys.exit(n_brokers == 0)
