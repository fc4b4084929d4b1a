"""A mail server for tests: aiosmtpd with STARTTLS or TLS and sign-in. Says every letter it takes as one line of JSON."""

import argparse
import asyncio
import email
import email.policy
import json
import ssl
import sys

from aiosmtpd.smtp import SMTP, AuthResult

arguments = argparse.ArgumentParser()
arguments.add_argument("--port", type=int, default=0)
arguments.add_argument("--tls", choices=["none", "starttls", "tls"], default="none")
arguments.add_argument("--certificate")
arguments.add_argument("--key")
arguments.add_argument("--user")
arguments.add_argument("--password")
arguments = arguments.parse_args()


def say(**what):
    print(json.dumps(what), flush=True)


def is_encrypted(server, session):
    """By STARTTLS, or from the first byte."""
    return session.ssl is not None or server.transport.get_extra_info("ssl_object") is not None


class House:
    """Knows nobody called nobody, and makes those called later come again once."""

    def __init__(self):
        self.turned_away = set()

    async def handle_RCPT(self, server, session, envelope, address, options):
        name = address.split("@")[0]
        if name == "nobody":
            return "550 5.1.1 no such mailbox"
        if name == "later" and address not in self.turned_away:
            self.turned_away.add(address)
            return "451 4.7.1 come again later"
        envelope.rcpt_tos.append(address)
        return "250 OK"

    async def handle_DATA(self, server, session, envelope):
        letter = email.message_from_bytes(envelope.original_content, policy=email.policy.default)
        say(
            message_id=str(letter["Message-ID"]),
            subject=str(letter["Subject"]),
            to=envelope.rcpt_tos,
            encrypted=is_encrypted(server, session),
            user=session.auth_data.decode() if session.auth_data else None,
        )
        return "250 2.0.0 kept"


def authenticate(server, session, envelope, mechanism, login):
    say(sign_in=login.login.decode(), encrypted=is_encrypted(server, session))
    if login.login.decode() == arguments.user and login.password.decode() == arguments.password:
        return AuthResult(success=True, auth_data=login.login)
    return AuthResult(success=False, handled=False)


async def serve():
    context = None
    if arguments.tls != "none":
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(arguments.certificate, arguments.key)
    house = House()

    def connection():
        return SMTP(
            house,
            hostname="mail.test",
            tls_context=context if arguments.tls == "starttls" else None,
            require_starttls=arguments.tls == "starttls",
            auth_required=arguments.user is not None,
            auth_require_tls=arguments.tls == "starttls",
            authenticator=authenticate if arguments.user else None,
        )

    wrapped = context if arguments.tls == "tls" else None
    server = await asyncio.get_running_loop().create_server(connection, "127.0.0.1", arguments.port, ssl=wrapped)
    say(port=server.sockets[0].getsockname()[1])
    # The test's end closes our input.
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


asyncio.run(serve())
