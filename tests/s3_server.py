"""moto's S3 server, with faults; run in the environment that `make` installs it into: PYTHON s3_server.py
PORT FAULTS LOG.

It serves one request at a time: moto looks and then writes, so that in threads its conditional put would not
be atomic, as S3's is. FAULTS is a JSON file: {"busy": 3} answers 503 SlowDown to two of three requests at
random, {"deny": true} refuses writes (403), {"slow": 0.2} keeps each part of an upload that long. LOG gets a
line for each request.
"""

import json
import random
import sys
import time
from pathlib import Path
from typing import Any

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, run_simple

REFUSAL = "<?xml version='1.0'?><Error><Code>{}</Code><Message>{}</Message></Error>"


def _main(port: str, faults: str, log: str) -> None:
    moto = DomainDispatcherApplication(create_backend_app)

    def app(environ: dict[str, Any], start: Any) -> Any:
        method, path, query = environ["REQUEST_METHOD"], environ["PATH_INFO"], environ["QUERY_STRING"]
        facts = json.loads(Path(faults).read_text())
        refused = None
        if facts.get("deny") and method != "GET" and method != "HEAD":
            refused = ("403 Forbidden", "AccessDenied", "Access Denied")
        elif random.randrange(facts.get("busy", 1)):
            refused = ("503 Slow Down", "SlowDown", "Please reduce your request rate.")
        if "partNumber" in query:
            time.sleep(facts.get("slow", 0))
        with open(log, "a") as lines:
            lines.write(
                f"{method} {path}{'?' if query else ''}{query}{' ' + refused[0] if refused else ''}\n"
            )
        if refused is None:
            return moto(environ, start)
        environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        start(refused[0], [("Content-Type", "application/xml")])
        return [REFUSAL.format(*refused[1:]).encode()]

    class Quiet(WSGIRequestHandler):
        def log_request(self, *args: Any) -> None:
            """The file `log` has it."""

    run_simple("127.0.0.1", int(port), app, threaded=False, request_handler=Quiet)


if __name__ == "__main__":
    _main(*sys.argv[1:])
