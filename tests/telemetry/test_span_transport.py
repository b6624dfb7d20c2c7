"""How spans travel by HTTP: what the variables of OpenTelemetry say of it holds, and nothing large is loaded for it."""

from __future__ import annotations

import http.server
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.telemetry.span_transport import HttpcoreTransport
from tests.certificates import make_certificate
from tests.conftest import ROOT, Serve, service_environ
from tests.otlp import OtlpReceiver

ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"
TRACED = {"TRACE_SAMPLE_RATIO": "1", "OTEL_EXPORTER_OTLP_TIMEOUT": "5"}


def certified(certificate: Path, clients: Path | None = None) -> ssl.SSLContext:
    """A server's, which asks for a certificate that `clients` has signed."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=clients)
    context.load_cert_chain(certificate)
    if clients is not None:
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def test_spans_go_to_a_receiver_that_asks_who_sends_them(serve: Serve, tmp_path: Path) -> None:
    server, client = make_certificate(tmp_path, "127.0.0.1"), make_certificate(tmp_path, "client")
    one = OtlpReceiver(tls=certified(server, client))
    named = {"CERTIFICATE": server, "CLIENT_CERTIFICATE": client, "CLIENT_KEY": client}
    try:
        files = {f"OTEL_EXPORTER_OTLP_{name}": str(path) for name, path in named.items()}
        running = serve(**TRACED, **one.environ, **files)
        assert len(one.wait_for_trace(running.execute("echo", {"message": "x"})["trace_id"], 2)) == 2
    finally:
        one.close()


def test_what_is_said_of_traces_goes_before_what_is_said_of_everything(serve: Serve, tmp_path: Path) -> None:
    server, other = make_certificate(tmp_path, "127.0.0.1"), make_certificate(tmp_path, "other")
    one = OtlpReceiver(tls=certified(server))
    endpoint = one.environ[ENDPOINT]
    try:
        running = serve(
            **TRACED,
            OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:1",
            OTEL_EXPORTER_OTLP_TRACES_ENDPOINT=f"{endpoint}/v1/traces",
            OTEL_EXPORTER_OTLP_CERTIFICATE=str(other),
            OTEL_EXPORTER_OTLP_TRACES_CERTIFICATE=str(server),
            OTEL_BSP_SCHEDULE_DELAY="20",
        )
        assert len(one.wait_for_trace(running.execute("echo", {"message": "x"})["trace_id"], 2)) == 2
    finally:
        one.close()


def test_a_receiver_whose_certificate_nobody_vouches_for_gets_nothing(tmp_path: Path) -> None:
    one = OtlpReceiver(tls=certified(make_certificate(tmp_path, "127.0.0.1")))
    try:
        transport = HttpcoreTransport(one.environ)
        result = transport.request("POST", f"{one.environ[ENDPOINT]}/v1/traces", data=b"", timeout=5)
        transport.close()
        assert result.status_code is None and "certificate" in str(result.error).lower()
        assert one.bodies == []
    finally:
        one.close()


@pytest.mark.parametrize("name", ["OTEL_EXPORTER_OTLP_CERTIFICATE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"])
def test_authorities_are_named_by_any_of_the_usual_variables(tmp_path: Path, name: str) -> None:
    certificate = make_certificate(tmp_path, "127.0.0.1")
    one = OtlpReceiver(tls=certified(certificate))
    try:
        transport = HttpcoreTransport({**one.environ, name: str(certificate)})
        result = transport.request("POST", f"{one.environ[ENDPOINT]}/v1/traces", data=b"", timeout=5)
        transport.close()
        assert result.status_code == 200, result.error
    finally:
        one.close()


def test_compression_and_headers_are_as_the_variables_say(serve: Serve) -> None:
    one = OtlpReceiver()
    try:
        said = {"OTEL_EXPORTER_OTLP_COMPRESSION": "gzip", "OTEL_EXPORTER_OTLP_HEADERS": "x-scope=team%20%C3%BC"}
        running = serve(**TRACED, **one.environ, **said)
        one.wait_for_trace(running.execute("echo", {"message": "x"})["trace_id"], 2)
        assert one.headers[0]["x-scope"] == "team \u00fc" and one.headers[0]["content-encoding"] == "gzip"
    finally:
        one.close()


class Elsewhere(http.server.BaseHTTPRequestHandler):
    """Answers with a redirect, and remembers what was asked for."""

    asked: list[str]

    def do_POST(self) -> None:
        self.asked.append(self.path)
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(307)
        self.send_header("location", "/elsewhere")
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def test_a_key_that_wants_a_password_is_refused_and_nobody_is_asked(tmp_path: Path) -> None:
    locked = make_certificate(tmp_path, "client", password=b"word")
    with pytest.raises(ssl.SSLError):
        HttpcoreTransport({ENDPOINT: "https://127.0.0.1:1", "OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE": str(locked)})


@pytest.fixture
def elsewhere() -> Iterator[tuple[str, list[str]]]:
    """The URL of such a server, and what it was asked for."""
    asked: list[str] = []
    server = http.server.HTTPServer(("127.0.0.1", 0), type("Handler", (Elsewhere,), {"asked": asked}))
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}", asked
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_redirect_is_no_arrival(elsewhere: tuple[str, list[str]]) -> None:
    url, asked = elsewhere
    transport = HttpcoreTransport({ENDPOINT: url})
    result = transport.request("POST", f"{url}/v1/traces", data=b"spans", timeout=5)
    transport.close()
    assert result.status_code is None and result.reason == "redirected by 307"
    assert asked == ["/v1/traces"]


@pytest.mark.parametrize(
    ("asked", "loaded"),
    [
        ({}, False),
        ({"HTTPS_PROXY": "http://127.0.0.1:1"}, True),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://user:word@127.0.0.1:1"}, True),
    ],
)
def test_the_librarys_own_client_is_loaded_where_it_alone_can_do_it(asked: dict[str, str], loaded: bool) -> None:
    """It takes 5 MB."""
    script = """
import os, sys
from app.telemetry.span_export import open_span_export
from app.telemetry.spans import sampler_of
assert open_span_export(sampler_of(1.0, os.environ)[0], os.environ, "1") is not None
print([name for name in ("requests", "urllib3", "charset_normalizer") if name in sys.modules])
"""
    environ = service_environ(**{"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", **asked})
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environ, capture_output=True, check=True)
    assert (b"requests" in done.stdout) is loaded
