"""Takes mails on 1025 and lists them on 8025 as Mailpit's `GET /api/v1/messages` does."""

import email
import email.policy
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from aiosmtpd.controller import Controller

messages, lock = [], threading.Lock()


class Sink:
    async def handle_DATA(self, server, session, envelope):
        mail = email.message_from_bytes(envelope.original_content, policy=email.policy.default)
        taken = {
            "MessageID": str(mail["Message-ID"] or "").strip("<>"),
            "Subject": str(mail["Subject"] or ""),
            "To": [{"Address": it} for it in envelope.rcpt_tos],
        }
        with lock:
            messages.insert(0, taken)
        return "250 2.0.0 Ok"


class Api(BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/readyz":
            code, body = 200, b"ok"
        elif self.path == "/api/v1/messages":
            with lock:
                code, body = 200, json.dumps({"total": len(messages), "messages": messages}).encode()
        else:
            code, body = 404, b"not found"
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


Controller(Sink(), hostname="0.0.0.0", port=1025).start()
ThreadingHTTPServer(("0.0.0.0", 8025), Api).serve_forever()
