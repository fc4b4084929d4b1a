"""Builds what changed in the dbt project on a warehouse in production, and writes down what is deployed there.

usage: deploy.py --state DIR --out DIR --version VERSION --image IMAGE   (by the Python of an environment that has dbt)

The addresses are the product's: LEDGERLINE__WAREHOUSE__URL and LEDGERLINE__STATE__URL with their …__PASSWORD; for
Snowflake …__WAREHOUSE__PRIVATE_KEY, a PEM or the path of one, instead of the warehouse's password. `--state`
may hold the manifest.json of what is deployed; what differs from it, and what follows, is built and tested, everything else
is taken as it stands (`--select state:modified+ --defer`). Without one everything is built.
"""

import argparse
import datetime
import json
import os
import pathlib
import subprocess
import sys
import urllib.parse

import psycopg2

ROOT = pathlib.Path(__file__).resolve().parent.parent
TRANSFORMATION = "DBT_Bank_Data_Transformation_Pipeline"
# As in src/dag/history.rs: whoever runs a DAG holds this in the state database.
LOCK = "select pg_try_advisory_lock(hashtextextended('ledgerline.dag.' || %s, 0))"


def connect(section):
    return psycopg2.connect(os.environ[f"LEDGERLINE__{section}__URL"], password=os.environ[f"LEDGERLINE__{section}__PASSWORD"], connect_timeout=30)


def tree(path):
    return subprocess.run(["git", "-C", ROOT, "rev-parse", f"HEAD:{path}"], check=True, capture_output=True, text=True).stdout.strip()


def on_snowflake():
    return os.environ["LEDGERLINE__WAREHOUSE__URL"].startswith("snowflake:")


def snowflake_environment():
    import snowflake_account

    place = snowflake_account.address()
    names = ("account", "host", "port", "protocol", "user", "database", "role", "warehouse")
    return {f"LEDGERLINE_DBT_{name.upper()}": str(place[name]) for name in names} | {
        "LEDGERLINE_DBT_TARGET": "snowflake",
        "LEDGERLINE_DBT_QUERY_TAG": "ledgerline/deploy",
        "DBT_ENV_SECRET_LEDGERLINE_PRIVATE_KEY": snowflake_account.pem("LEDGERLINE__WAREHOUSE__PRIVATE_KEY"),
        # dbt renders the other output of the profile too.
        "DBT_ENV_SECRET_LEDGERLINE_PASSWORD": "",
    }


def dbt_environment():
    if on_snowflake():
        return os.environ | snowflake_environment()
    url = urllib.parse.urlsplit(os.environ["LEDGERLINE__WAREHOUSE__URL"])
    return os.environ | {
        "LEDGERLINE_DBT_TARGET": "postgres",
        "LEDGERLINE_DBT_HOST": url.hostname,
        "LEDGERLINE_DBT_PORT": str(url.port or 5432),
        "LEDGERLINE_DBT_USER": urllib.parse.unquote(url.username),
        "LEDGERLINE_DBT_DATABASE": urllib.parse.unquote(url.path.lstrip("/")),
        "LEDGERLINE_DBT_APPLICATION": "ledgerline deploy",
        "DBT_ENV_SECRET_LEDGERLINE_PASSWORD": os.environ["LEDGERLINE__WAREHOUSE__PASSWORD"],
    }


def dbt(command, out, *arguments):
    program = [sys.executable, "-c", "from dbt.cli.main import cli; cli()", "--no-version-check", "--no-use-colors", command]
    places = ["--project-dir", ROOT / "dbt", "--profiles-dir", ROOT / "dbt", "--target-path", out, "--log-path", out / "logs"]
    return subprocess.run([*program, *places, *arguments], env=dbt_environment()).returncode


def is_loaded():
    if on_snowflake():
        # Of its adapter's environment only.
        import snowflake_account

        with snowflake_account.connect(snowflake_account.address()) as session, session.cursor() as cursor:
            cursor.execute("select count(*) from information_schema.tables where upper(table_schema) = 'RAW' and upper(table_name) = 'TRANSACTIONS'")
            return cursor.fetchone()[0] > 0
    with connect("WAREHOUSE") as warehouse, warehouse.cursor() as cursor:
        cursor.execute("select to_regclass('raw.transactions') is not null")
        (loaded,) = cursor.fetchone()
    warehouse.close()
    return loaded


def build(state, out):
    """True: what changed is built and its tests pass. None: there is nothing to build on yet."""
    if not is_loaded():
        print("nothing has been loaded into this warehouse yet: the first run of the DAG builds everything")
        return None if dbt("parse", out) == 0 else False
    changed = ["--select", "state:modified+", "--defer", "--state", state] if (state / "manifest.json").is_file() else []
    return dbt("build", out, *changed) == 0


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("state", "out"):
        parser.add_argument(f"--{name}", type=lambda it: pathlib.Path(it).resolve(), required=True)
    for name in ("version", "image"):
        parser.add_argument(f"--{name}", required=True)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)

    # Two builds at once would append twice. The lock is the session's, so the connection stays open until the end.
    with connect("STATE") as state, state.cursor() as cursor:
        cursor.execute(LOCK, [TRANSFORMATION])
        if cursor.fetchone() != (True,):
            sys.exit(f"a pipeline runs {TRANSFORMATION} on this warehouse: stop it, deploy, and start the new version")
        built = build(arguments.state, arguments.out)
    state.close()
    if built is False:
        sys.exit("a model or a test failed: the deployment is not recorded")

    results = arguments.out / "run_results.json"
    nodes = [it for it in json.loads(results.read_text())["results"] if not it["unique_id"].startswith("operation.")] if built else []
    record = {
        "version": arguments.version,
        "image": arguments.image,
        "deployed_at": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        # What a DAG does is its steps and the dbt project: git names both by their content.
        "dags": {"MinIO_S3_to_Snowflake": {"steps": tree("src/refresh")}, TRANSFORMATION: {"steps": tree("src/refresh"), "dbt": tree("dbt")}},
        "built": {it["unique_id"]: it["status"] for it in nodes},
    }
    (arguments.out / "deployment.json").write_text(json.dumps(record, indent=2) + "\n")
    print(f"{len(nodes)} nodes built and tested")


main()
