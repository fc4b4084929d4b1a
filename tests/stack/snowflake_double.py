"""The Snowflake double: fakesnow's server with the mends that our clients needed, each after a failure that was seen.

usage: snowflake_double.py PORT    environment: S3_ENDPOINT, S3_ID, S3_SECRET (of external stages)

Beside Snowflake's protocol, for tests and people:
  GET  /double/sign-ins?database=D     what each sign-in to a database said of itself: user, role, warehouse, query tag
  PUT  /double/refusal?database=D      {"sign_in": bool, "sql": pattern or null, "code": "…", "message": "…"}: what an administrator's
                                       hand would do, a role revoked or a warehouse suspended; an empty object takes it back
"""

import gzip
import json
import os
import re
import sys
import urllib.parse

import duckdb
import fakesnow.arrow
import fakesnow.copy_into
import fakesnow.cursor
import fakesnow.info_schema
import fakesnow.server
import fakesnow.transforms
import pyarrow
import s3fs
import snowflake.connector.errors
import uvicorn
from sqlglot import exp


def external_stages():
    """COPY INTO from s3:// stages through fsspec: DuckDB's own S3 extension would be a download."""
    store = s3fs.S3FileSystem(
        key=os.environ["S3_ID"],
        secret=os.environ["S3_SECRET"],
        use_listings_cache=False,
        client_kwargs={"endpoint_url": os.environ["S3_ENDPOINT"], "region_name": "us-east-1"},
    )
    fakesnow.server.shared_fs.duck_conn.register_filesystem(store)


def null_timestamps():
    """fakesnow declares the children of a timestamp's struct non-nullable and sets no validity mask."""
    original = fakesnow.arrow.timestamp_to_sf_struct

    def mended(array):
        if isinstance(array, pyarrow.ChunkedArray):
            array = array.combine_chunks()
        if array.null_count == 0:
            return original(array)
        struct = original(array.fill_null(pyarrow.scalar(0, array.type)))
        fields = [struct.field(at) for at in range(struct.type.num_fields)]
        return pyarrow.StructArray.from_arrays(fields, fields=list(struct.type), mask=array.is_null())

    fakesnow.arrow.timestamp_to_sf_struct = mended


def statements():
    """Qualified temporary relations, s3compat:// stages and current_warehouse()."""
    rules = [
        (re.compile(r"^(\s*(?:/\*.*?\*/\s*)*create\s+or\s+replace\s+)temp(?:orary)?\s+(table|view)\b", re.I | re.S), r"\1\2"),
        (re.compile(r"s3compat://", re.I), "s3://"),
        (re.compile(r"\bcurrent_warehouse\(\)", re.I), "'WH'"),
    ]
    original = fakesnow.cursor.FakeSnowflakeCursor.execute

    def mended(self, command, *arguments, **named):
        for pattern, replacement in rules:
            command = pattern.sub(replacement, command)
        return original(self, command, *arguments, **named)

    fakesnow.cursor.FakeSnowflakeCursor.execute = mended


def merge():
    """Unqualified columns in MERGE's INSERT … VALUES belong to the source; fakesnow leaves them ambiguous."""
    original = fakesnow.transforms.merge

    def mended(expression):
        if isinstance(expression, exp.Merge):
            source = expression.args["using"].alias_or_name
            whens = expression.args["whens"]
            for when in getattr(whens, "expressions", whens):
                then = when.args.get("then")
                if isinstance(then, exp.Insert) and then.expression is not None:
                    for column in then.expression.find_all(exp.Column):
                        if not column.args.get("table"):
                            column.set("table", exp.to_identifier(source))
        return original(expression)

    fakesnow.transforms.merge = mended


def comments():
    """fakesnow writes a table's comment inside the caller's transaction, into another database: DuckDB refuses that."""
    original = fakesnow.info_schema.insert_table_comment_sql

    def mended(catalog, schema, table, comment):
        return "select 1" if not comment or table.upper() == "MERGE_CANDIDATES" else original(catalog, schema, table, comment)

    fakesnow.info_schema.insert_table_comment_sql = mended


def administration():
    """There is nobody to create and nothing to grant: what an administrator says is taken and forgotten."""
    fakesnow.server.shared_fs.nop_regexes = [r"^\s*(create|alter)\s+(warehouse|user|role)\b", r"^\s*grant\s", r"^\s*use\s+role\b"]


def file_names():
    """METADATA$FILENAME in a COPY's transformation: the file's path in its bucket."""
    original = fakesnow.copy_into._inserts

    def mended(expression, parameters, urls, parquet=None):
        inserts = original(expression, parameters, urls, parquet)
        for insert, url in zip(inserts, urls):
            for column in list(insert.find_all(exp.Column)):
                if column.name.upper() == "METADATA$FILENAME":
                    column.replace(exp.Literal.string(urllib.parse.urlsplit(url).path.lstrip("/")))
        return inserts

    fakesnow.copy_into._inserts = mended


def no_json():
    """What is no JSON is an error about a value, not one of the server's."""
    original = fakesnow.cursor.copy_into

    def mended(*arguments, **named):
        try:
            return original(*arguments, **named)
        except duckdb.InvalidInputException as error:
            if "Malformed JSON" not in str(error):
                raise
            raise snowflake.connector.errors.ProgrammingError(msg="Error parsing JSON: '…'", errno=100069, sqlstate="22P02") from None

    fakesnow.cursor.copy_into = mended


def completed(path, answer):
    """The fields of an answer that snowflake-api requires and fakesnow leaves out."""
    data = answer.get("data")
    if path.endswith("login-request") and data:
        for key, value in {"sessionId": 1, "masterToken": "double", "masterValidityInSeconds": 14400, "validityInSeconds": 3600}.items():
            data.setdefault(key, value)
        data["sessionInfo"].setdefault("roleName", "SYSADMIN")
    elif path.endswith("query-request") and answer.get("success"):
        if "rowtype" in data:
            for key, value in {"returned": data.get("total", 0), "finalRoleName": "SYSADMIN", "version": 1, "parameters": []}.items():
                data.setdefault(key, value)
    elif path.endswith("query-request"):
        data = answer["data"] = data or {}
        known = {"age": 0, "errorCode": answer.get("code") or "261000", "internalError": False, "queryId": "", "sqlState": "HY000"}
        data.update({key: value for key, value in known.items() if data.get(key) is None})
    return answer


def failed(body, is_json):
    """A 500 makes every Snowflake client try again for minutes: the same as a refusal."""
    message = json.loads(body).get("message", "") if is_json else body.decode()[-400:]
    return {"data": None, "code": "261000", "message": message, "success": False}


class Desk:
    """Who has signed in, and what is refused to whom: by database, because each test has its own."""

    def __init__(self):
        self.sign_ins, self.refusals, self.databases = {}, {}, {}

    def answer(self, scope, body):
        database = dict(urllib.parse.parse_qsl(scope["query_string"].decode())).get("database", "").upper()
        if scope["path"] == "/double/refusal" and scope["method"] == "PUT":
            self.refusals[database] = json.loads(body)
            return {}
        return self.sign_ins.get(database, []) if scope["path"] == "/double/sign-ins" else None

    def refuses(self, scope, body):
        """None, or the refusal instead of an answer."""
        path, asked = scope["path"].replace("//", "/"), dict(urllib.parse.parse_qsl(scope["query_string"].decode()))
        signs_in = path.endswith("login-request")
        if not signs_in and not path.endswith("query-request"):
            return None
        request = json.loads(gzip.decompress(body) if body[:2] == b"\x1f\x8b" else body)
        if signs_in:
            database = asked.get("databaseName", "").upper()
            tag = request["data"].get("SESSION_PARAMETERS", {}).get("QUERY_TAG")
            said = {"user": request["data"].get("LOGIN_NAME"), "role": asked.get("roleName"), "warehouse": asked.get("warehouse"), "query_tag": tag}
            self.sign_ins.setdefault(database, []).append(said)
        else:
            database = self.databases.get(dict(scope["headers"]).get(b"authorization", b"").decode())
        refusal = self.refusals.get(database)
        if not refusal or not (refusal.get("sign_in") if signs_in else refusal.get("sql") and re.search(refusal["sql"], request["sqlText"], re.I | re.S)):
            return None
        data = {"errorCode": refusal["code"], "sqlState": "08001", "age": 0, "internalError": False, "queryId": ""}
        return {"data": data, "code": refusal["code"], "message": refusal["message"], "success": False}

    def signed_in(self, scope, answer):
        token = (answer.get("data") or {}).get("token")
        if token:
            database = dict(urllib.parse.parse_qsl(scope["query_string"].decode())).get("databaseName", "").upper()
            self.databases[f'Snowflake Token="{token}"'] = database


async def whole(receive):
    body = b""
    while True:
        event = await receive()
        body += event.get("body", b"")
        if not event.get("more_body"):
            return body


async def reply(send, answer):
    body = json.dumps(answer).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class Mended:
    """The server, with its answers completed."""

    def __init__(self, server):
        self.server, self.desk = server, Desk()

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.server(scope, receive, send)
        asked = await whole(receive)
        answered = self.desk.answer(scope, asked)
        answered = self.desk.refuses(scope, asked) if answered is None else answered
        if answered is not None:
            return await reply(send, answered)
        start, body, given = {}, b"", False

        async def again():
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": asked, "more_body": False}

        async def answer(event):
            nonlocal body
            if event["type"] == "http.response.start":
                start.update(event)
                return
            body += event.get("body", b"")
            if event.get("more_body"):
                return
            is_json = b"json" in dict(start["headers"]).get(b"content-type", b"")
            if start["status"] == 500:
                start["status"], sent = 200, json.dumps(completed(scope["path"], failed(body, is_json))).encode()
            else:
                sent = body
                if is_json:
                    said = completed(scope["path"], json.loads(body))
                    self.desk.signed_in(scope, said)
                    sent = json.dumps(said).encode()
            headers = [(name, value) for name, value in start["headers"] if name != b"content-length"]
            headers.append((b"content-length", str(len(sent)).encode()))
            await send({"type": "http.response.start", "status": start["status"], "headers": headers})
            await send({"type": "http.response.body", "body": sent})

        await self.server(scope, again, answer)


def main():
    for mend in (external_stages, null_timestamps, statements, merge, comments, administration, file_names, no_json):
        mend()
    uvicorn.run(Mended(fakesnow.server.app), host="127.0.0.1", port=int(sys.argv[1]), log_level="warning")


if __name__ == "__main__":
    main()
