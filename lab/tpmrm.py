"""A laboratory host's TPM resource manager: what /dev/tpmrm0 does for a TPM that is a program.

Runs alone (``python -I tpmrm.py PORT SOCKET``): serves one client of 127.0.0.1:PORT after the other, and when a client
is gone, killed or not, flushes the objects and sessions it left, as the kernel does. SOCKET is the swtpm. Clients speak
the protocol of Microsoft's simulator: of what tpm2-tss has for a TPM at a socket, it alone keeps its connection.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import sys
import threading

HEADER = struct.Struct(">HII")
FRAME = struct.Struct(">I")
SEND, END = 8, 20
CC_FLUSH, CC_CAPABILITY = 0x165, 0x17A
CAP_HANDLES = 1
LEFT = (0x80000000, 0x02000000, 0x03000000)  # transient objects, loaded and saved sessions (part 2, 7.4)
MORE = 64  # handles asked for at once; a TPM holds three of each kind, and 64 sessions


def main() -> None:
    port = int(sys.argv[1])
    platform = socket.create_server(("127.0.0.1", port + 1))
    threading.Thread(target=switch, args=(platform,), daemon=True).start()
    listener = socket.create_server(("127.0.0.1", port))
    with socket.socket(socket.AF_UNIX) as tpm:
        tpm.connect(sys.argv[2])
        while True:
            client, _ = listener.accept()
            with client:
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                with contextlib.suppress(OSError):  # it was killed
                    serve(client, tpm)
            flush(tpm)


def switch(listener: socket.socket) -> None:
    """The simulator's other port: whoever switches the TPM on is told that it is."""
    while True:
        threading.Thread(target=agree, args=(listener.accept()[0],), daemon=True).start()


def agree(client: socket.socket) -> None:
    with client, contextlib.suppress(OSError):
        while exactly(client, 4):
            client.sendall(bytes(4))


def serve(client: socket.socket, tpm: socket.socket) -> None:
    """Frames of the simulator: SEND, locality, size, command; answered by size, response and four zero bytes."""
    while FRAME.unpack(exactly(client, 4) or FRAME.pack(END))[0] == SEND:
        # the client sends in small parts, each of which waits for this side to say that it has the one before
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        _, size = struct.unpack(">BI", exactly(client, 5))
        response = transmit(tpm, exactly(client, size))
        client.sendall(FRAME.pack(len(response)) + response + bytes(4))


def transmit(tpm: socket.socket, command: bytes) -> bytes:
    tpm.sendall(command)
    return message(tpm)


def message(end: socket.socket) -> bytes:
    """One response, by the size in its header."""
    header = exactly(end, HEADER.size)
    return header + exactly(end, HEADER.unpack(header)[1] - HEADER.size)


def exactly(end: socket.socket, size: int) -> bytes:
    """So many bytes; none when the other side is gone before the first.

    Raises:
        ConnectionError: it is gone before the last.
    """
    data = b""
    while len(data) < size:
        part = end.recv(size - len(data))
        if not part and data:
            raise ConnectionError
        if not part:
            break
        data += part
    return data


def flush(tpm: socket.socket) -> None:
    for kind in LEFT:
        answer = transmit(tpm, HEADER.pack(0x8001, 22, CC_CAPABILITY) + struct.pack(">III", CAP_HANDLES, kind, MORE))
        # behind the header: moreData, the capability, how many
        (count,) = struct.unpack_from(">I", answer, 15)
        for (handle,) in struct.iter_unpack(">I", answer[19 : 19 + 4 * count]):
            transmit(tpm, HEADER.pack(0x8001, 14, CC_FLUSH) + struct.pack(">I", handle))


if __name__ == "__main__":
    main()
