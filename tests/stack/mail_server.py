"""An SMTP server that keeps what it is given, and the part of Mailpit's API that reads it back. In memory, loopback only.

usage: mail_server.py SMTP_PORT API_PORT FOLDER (of server.pem and server.key)   environment: MAIL_PASSWORD, of user ledgerline

STARTTLS is offered; whoever signs in must have used it, and must know the password. Mail is taken without a sign-in, too.
"""

import datetime
import email
import email.policy
import email.utils
import hmac
import json
import os
import ssl
import sys
import threading
import urllib.parse
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from aiosmtpd.controller import Controller
from aiosmtpd.smtp import AuthResult, LoginPassword

LOOPBACK = "127.0.0.1"
KEPT = 2000

box = []  # The newest first.
box_lock = threading.Lock()


def addresses(headers):
    return [{"Name": name, "Address": address} for name, address in email.utils.getaddresses([str(it) for it in headers])]


def authenticate(_server, _session, _envelope, _mechanism, credentials):
    ok = (
        isinstance(credentials, LoginPassword)
        and credentials.login == b"ledgerline"
        and hmac.compare_digest(credentials.password, os.environ["MAIL_PASSWORD"].encode())
    )
    return AuthResult(success=ok, handled=False)


class Sink:
    async def handle_DATA(self, _server, session, envelope):
        message = email.message_from_bytes(envelope.original_content, policy=email.policy.default)
        text, html = message.get_body(("plain",)), message.get_body(("html",))
        now = datetime.datetime.now(datetime.timezone.utc).isoformat()
        kept = {
            "ID": uuid.uuid4().hex[:22],
            "MessageID": str(message["Message-ID"] or "").strip("<>"),
            "From": (addresses(message.get_all("From", [])) or [None])[0],
            "To": addresses(message.get_all("To", [])),
            "Cc": addresses(message.get_all("Cc", [])),
            "Subject": str(message["Subject"] or ""),
            "Created": now,
            "Size": len(envelope.original_content),
            "Text": text.get_content() if text else "",
            "HTML": html.get_content() if html else "",
            # Not Mailpit's: how it came.
            "TLS": session.ssl is not None,
            "SignedIn": bool(session.authenticated),
            "raw": envelope.original_content,
        }
        with box_lock:
            box.insert(0, kept)
            del box[KEPT:]
        return f"250 2.0.0 Ok: queued as {kept['ID']}"


class Api(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def answer(self, code, body, kind="application/json"):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        url = urllib.parse.urlparse(self.path)
        query = {name: values[0] for name, values in urllib.parse.parse_qs(url.query).items()}
        with box_lock:
            mails = list(box)
        match url.path.strip("/").split("/"):
            case ["livez" | "readyz"]:
                self.answer(200, b"ok", "text/plain")
            case ["api", "v1", "messages" | "search"]:
                wanted = query.get("query", "").lower()
                hits = [it for it in mails if wanted in (it["Subject"] + json.dumps(it["To"]) + it["MessageID"] + it["Text"]).lower()]
                start = int(query.get("start", 0))
                page = hits[start : start + int(query.get("limit", 50))]
                summaries = [{key: value for key, value in it.items() if key not in ("raw", "Text", "HTML")} for it in page]
                self.answer(200, {"total": len(mails), "messages_count": len(hits), "count": len(page), "start": start, "messages": summaries})
            case ["api", "v1", "message", wanted, *rest]:
                mail = next((it for it in mails if wanted in (it["ID"], "latest")), None)
                if mail is None:
                    self.answer(404, {"Error": "message not found"})
                elif rest == ["raw"]:
                    self.answer(200, mail["raw"], "text/plain")
                else:
                    self.answer(200, {key: value for key, value in mail.items() if key != "raw"})
            case _:
                self.answer(404, {"Error": "not found"})

    def do_DELETE(self):
        length = int(self.headers.get("Content-Length") or 0)
        ids = json.loads(self.rfile.read(length)).get("IDs", []) if length else []
        with box_lock:
            box[:] = [it for it in box if ids and it["ID"] not in ids]
        self.answer(200, b"ok", "text/plain")


def main():
    smtp_port, api_port, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(f"{folder}/server.pem", f"{folder}/server.key")
    Controller(Sink(), hostname=LOOPBACK, port=smtp_port, tls_context=context, authenticator=authenticate, auth_require_tls=True).start()
    ThreadingHTTPServer((LOOPBACK, api_port), Api).serve_forever()


if __name__ == "__main__":
    main()
