"""Many clients that ask at the same moment, in a process of their own: `python crowd.py PORT COUNT BODY`.

Prints JSON: for each client the status, the seconds from its first packet to the first byte of its answer, and the
answer's `retry-after`. Sockets and a selector, so that the clients wait for the server and not for each other.
"""

import json
import re
import selectors
import socket
import sys
import time

WAIT_S = 120


def main() -> None:
    """Ask and print."""
    port, count, body = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3].encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    waiting, asked_at, found = selectors.DefaultSelector(), {}, []
    socks = [socket.socket() for _ in range(count)]
    for sock in socks:
        sock.setblocking(False)
    for sock in socks:
        asked_at[sock] = time.perf_counter()
        sock.connect_ex(("127.0.0.1", port))
        waiting.register(sock, selectors.EVENT_WRITE)
    end = time.monotonic() + WAIT_S
    while waiting.get_map() and time.monotonic() < end:
        for key, events in waiting.select(1):
            sock = key.fileobj
            if events & selectors.EVENT_WRITE:
                sock.sendall(head + body)
                waiting.modify(sock, selectors.EVENT_READ)
                continue
            answer = sock.recv(65536)
            took_s = time.perf_counter() - asked_at[sock]
            retry = re.search(rb"retry-after: (\d+)", answer)
            found.append((int(answer[9:12] or 0), took_s, int(retry[1]) if retry else None))
            waiting.unregister(sock)
            sock.close()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
