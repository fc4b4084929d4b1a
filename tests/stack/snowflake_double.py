"""The Snowflake double: fakesnow's server with the mends that our clients needed, each after a failure that was seen.

usage: snowflake_double.py PORT    environment: S3_ENDPOINT, S3_ID, S3_SECRET (of external stages)
"""

import json
import os
import re
import sys

import fakesnow.arrow
import fakesnow.cursor
import fakesnow.info_schema
import fakesnow.server
import fakesnow.transforms
import pyarrow
import s3fs
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


class Mended:
    """The server, with its answers completed."""

    def __init__(self, server):
        self.server = server

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.server(scope, receive, send)
        start, body = {}, b""

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
                sent = json.dumps(completed(scope["path"], json.loads(body))).encode() if is_json else body
            headers = [(name, value) for name, value in start["headers"] if name != b"content-length"]
            headers.append((b"content-length", str(len(sent)).encode()))
            await send({"type": "http.response.start", "status": start["status"], "headers": headers})
            await send({"type": "http.response.body", "body": sent})

        await self.server(scope, receive, answer)


def main():
    for mend in (external_stages, null_timestamps, statements, merge, comments):
        mend()
    uvicorn.run(Mended(fakesnow.server.app), host="127.0.0.1", port=int(sys.argv[1]), log_level="warning")


if __name__ == "__main__":
    main()
