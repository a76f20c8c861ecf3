import socket
import threading

server = socket.create_server(("127.0.0.1", 0))
client = socket.create_connection(server.getsockname())
peer, _ = server.accept()
thread = threading.Thread(target=lambda: client.sendall(b"hello"))
thread.start()
print(peer.recv(5))
thread.join()
