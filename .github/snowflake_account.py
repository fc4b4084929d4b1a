"""What a deployment asks of a Snowflake account beside dbt.

usage: snowflake_account.py setup [--dry-run] FILE     runs the setup, as the administrator
       snowflake_account.py sweep                      drops what tests left behind: databases whose names begin like the address's

The address is the product's, LEDGERLINE__WAREHOUSE__URL with …__ENDPOINT and …__PRIVATE_KEY. The administrator signs in as
SNOWFLAKE_ADMIN_USER with the key in SNOWFLAKE_ADMIN_PRIVATE_KEY; without one nothing is set up. The file's names are those
of its comments; where the address says others, they take their places, and the user gets the public half of the private key.
"""

import argparse
import base64
import os
import pathlib
import re
import sys
import urllib.parse

from cryptography.hazmat.primitives import serialization

# As assets/snowflake-setup.sql has them, longest first: one is the beginning of another.
NAMES = ("ledgerline_service", "ledgerline_reader", "ledgerline_wh", "ledgerline", "bank")


def address(url=None):
    """snowflake://ACCOUNT/DATABASE?warehouse=…&role=…&user=… → its parts."""
    parts = urllib.parse.urlsplit(url or os.environ["LEDGERLINE__WAREHOUSE__URL"])
    asked = dict(urllib.parse.parse_qsl(parts.query))
    found = {"account": parts.hostname, "database": parts.path.strip("/"), **{name: asked.get(name, "") for name in ("warehouse", "role", "user")}}
    for name, value in found.items():
        if name != "account" and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_$]*", value):
            sys.exit(f"LEDGERLINE__WAREHOUSE__URL: {name} must be letters, digits and _, as in snowflake://ACCOUNT/DATABASE?warehouse=…&role=…&user=…")
    endpoint = urllib.parse.urlsplit(os.environ.get("LEDGERLINE__WAREHOUSE__ENDPOINT") or f"https://{found['account'].replace('_', '-')}.snowflakecomputing.com")
    port = endpoint.port or (443 if endpoint.scheme == "https" else 80)
    return found | {"protocol": endpoint.scheme, "host": endpoint.hostname, "port": port}


def pem(variable):
    """The text of a key, or of the file that is named."""
    given = os.environ[variable].replace("\\n", "\n")
    return given if given.lstrip().startswith("-----BEGIN ") else pathlib.Path(given.strip()).read_text()


def private_key(variable):
    return serialization.load_pem_private_key(pem(variable).encode(), password=None)


def connect(place, variable="LEDGERLINE__WAREHOUSE__PRIVATE_KEY", **instead):
    import snowflake.connector

    der = private_key(variable).private_bytes(serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    who = {name: place[name] for name in ("account", "user", "role", "warehouse", "database", "host", "port", "protocol")} | instead
    session = {"QUERY_TAG": "ledgerline/deploy", "TIMEZONE": "UTC"}
    return snowflake.connector.connect(**{name: it for name, it in who.items() if it is not None}, private_key=der, session_parameters=session, login_timeout=60, application="ledgerline")


def statements(text):
    """Its statements, without comments. The file has no `;` or `--` inside of quotes."""
    bare = "\n".join(line.split("--")[0].rstrip() for line in text.splitlines())
    return [it.strip() for it in bare.split(";") if it.strip()]


def renamed(sql, place):
    ours = {"ledgerline_service": place["user"], "ledgerline_reader": f"{place['role']}_reader", "ledgerline_wh": place["warehouse"], "ledgerline": place["role"], "bank": place["database"]}
    return re.sub(rf"\b({'|'.join(NAMES)})\b", lambda it: ours[it[0].lower()].lower() if it[0].islower() else ours[it[0].lower()].upper(), sql, flags=re.I)


def public_half(variable):
    key = private_key(variable).public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return base64.b64encode(key).decode()


def setup(file, dry_run):
    place = address()
    todo = [renamed(it, place).replace("<the public key>", public_half("LEDGERLINE__WAREHOUSE__PRIVATE_KEY")) for it in statements(file.read_text())]
    if dry_run:
        print(";\n\n".join(todo) + ";")
        return
    # Each step names its role; none of them needs the warehouse or the database that it makes.
    admin = {"user": os.environ["SNOWFLAKE_ADMIN_USER"], "role": None, "warehouse": None, "database": None}
    with connect(place, "SNOWFLAKE_ADMIN_PRIVATE_KEY", **admin) as session, session.cursor() as cursor:
        for sql in todo:
            try:
                cursor.execute(sql)
            except Exception as error:
                sys.exit(f"{sql.splitlines()[0]} …: {error}")
    print(f"{len(todo)} statements ran; whatever was there already is as it was")


def sweep():
    place = address()
    with connect(place) as session, session.cursor() as cursor:
        cursor.execute("show databases")
        at = [it[0].lower() for it in cursor.description].index("name")
        left = [row[at] for row in cursor.fetchall() if row[at].startswith(f"{place['database'].upper()}_")]
        for name in left:
            cursor.execute(f'drop database if exists "{name}"')
    print(f"{len(left)} databases dropped")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    parsing = commands.add_parser("setup")
    parsing.add_argument("--dry-run", action="store_true")
    parsing.add_argument("file", type=pathlib.Path)
    commands.add_parser("sweep")
    arguments = parser.parse_args()
    setup(arguments.file, arguments.dry_run) if arguments.command == "setup" else sweep()
