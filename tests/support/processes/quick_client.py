"""python -I -S quick_client.py SOCKET ARGUMENTS: what quick_python starts; it imports little, for it is to be quick."""

import json
import os
import signal
import socket
import sys

place, *arguments = sys.argv[1:]
asked = json.dumps({"arguments": arguments, "cwd": os.getcwd(), "env": dict(os.environ)}).encode()
server = socket.socket(socket.AF_UNIX)
server.connect(place)
socket.send_fds(server, [len(asked).to_bytes(8, "little")], [0, 1, 2])
server.sendall(asked)
answers = server.makefile()
pid = int(answers.readline())
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, lambda number, frame: os.kill(pid, number))
status = int(answers.readline())
if status < 0:
    signal.signal(-status, signal.SIG_DFL)
    os.kill(os.getpid(), -status)
os._exit(status)
