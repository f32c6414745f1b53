"""Writes an Envoy configuration for several servers: `python deploy/envoy.py --server ADDRESS ... > envoy.yaml`.

    <port of gRPC>    Triton's gRPC service, over HTTP/2
    <port of HTTP>    Triton's HTTP endpoints

Callers need a certificate. They reach what asks models, and nothing that controls a server. Envoy asks each server
whether it is ready, gives a request to a server with few of them, and gives it to another one as long as nothing of an
answer has come. docs/how-to/run-several-servers.md says more.
"""

from __future__ import annotations

import argparse
import ipaddress
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

Config = dict[str, Any]
MEBIBYTE = 2**20
SERVICE = "/inference.GRPCInferenceService/"
# Without what loads models, takes files, shares memory, traces or logs.
ANSWERS = ("ModelInfer", "ModelStreamInfer")
QUESTIONS = ("ServerLive", "ServerReady", "ModelReady", "ModelMetadata", "ModelConfig")
STATISTICS = "ModelStatistics"
HEALTH = "/grpc.health.v1.Health/Check"
# The last is Triton's: a stream with an error ends tritonserver 2.51 where a caller sends it.
HIDDEN_HEADERS = ("trident-admin-key", "triton-grpc-protocol-trident-admin-key", "triton_grpc_error")
UPSTREAM = ("http.upstream_codec", "http.upstream_codec.v3.UpstreamCodec")
QUESTION_SECONDS = 10
ANSWER_MARGIN = 10  # seconds after which a proxy gives up later than the server, whose error says more
NESTING = 200
MEMBERS = 1000
# tritonserver 2.51 ends on JSON that is nested 100,000 deep, needs a time for the members of an object that grows with
# the square of their number, and unpacks what is compressed, however large it becomes. A colon outside of texts is a
# member.
# Behind the JSON of an `infer` there may be tensors as bytes. What fails here is refused: by default Envoy would let it
# through.
LUA = f"""\
local function refusal(handle)
  local path = handle:headers():get(":path"):match("^[^?]*")
  local bytes = handle:headers():get("inference-header-content-length")
  if handle:headers():get("content-encoding") then
    return "415", "send the body as it is, not compressed"
  end
  local body = handle:body()
  if body == nil then
    return nil
  end
  local length = body:length()
  if bytes and path:match("/infer$") then
    if not bytes:match("^%d+$") then
      return "400", "inference-header-content-length is no number"
    end
    length = math.min(length, tonumber(bytes))
  end
  local text, depth, at, members = body:getBytes(0, length), 0, 1, {{}}
  while true do
    local found = text:find('["%[%]{{}}:]', at)
    if found == nil then
      return nil
    end
    local sign = text:sub(found, found)
    at = found + 1
    if sign == '"' then
      repeat
        found = text:find('["\\\\]', at)
        if found == nil then
          return nil
        end
        sign = text:sub(found, found)
        at = found + (sign == '"' and 1 or 2)
      until sign == '"'
    elseif sign == ":" then
      members[depth] = (members[depth] or 0) + 1
      if members[depth] > {MEMBERS} then
        return "400", "an object of the JSON has more than {MEMBERS} members"
      end
    elseif sign == "[" or sign == "{{" then
      depth = depth + 1
      members[depth] = 0
      if depth > {NESTING} then
        return "400", "the JSON is nested more than {NESTING} deep"
      end
    else
      depth = depth - 1
    end
  end
end

function envoy_on_request(handle)
  local ran, status, why = pcall(refusal, handle)
  if not ran then
    status, why = "400", "this proxy can't read the request"
  end
  if status then
    handle:respond({{[":status"] = status}}, why)
  end
end
"""
# Triton says 400 of whatever a generator refuses; Envoy sends a 503 to another server.
STATUS_LUA = """\
function envoy_on_response(handle)
  if handle:headers():get(":status") ~= "400" then
    return
  end
  local body = handle:body()
  if body == nil then
    return
  end
  local said = body:getBytes(0, math.min(64, body:length()))
  if said:find('"error":"UNAVAILABLE: ', 1, true) then
    handle:headers():replace(":status", "503")
  end
end
"""


@dataclass(frozen=True)
class Server:
    """A server behind the proxy; a name stands for every address that it has."""

    host: str
    http_port: int = 8000
    grpc_port: int = 8001

    @classmethod
    def parse(cls, text: str) -> Server:
        """Reads `host`, or `host:http port:grpc port`.

        Raises:
            ValueError: it is neither.
        """
        host, *ports = text.rsplit(":", 2) if not text.endswith("]") else [text]
        if len(ports) not in (0, 2) or not host or not all(port.isdecimal() and int(port) < 65536 for port in ports):
            raise ValueError(f"{text!r} is no server: give HOST, or HOST:HTTP_PORT:GRPC_PORT")
        return cls(host.strip("[]"), *map(int, ports))


@dataclass(frozen=True)
class Options:
    """What a configuration is made of.

    Attributes:
        listen: address for callers.
        certificate: PEM file of the proxy, with its chain; None: nothing is encrypted, on this machine only.
        key: PEM file of its key.
        client_ca: PEM file of the authorities whose certificates callers have.
        models: names that callers may ask over HTTP; (): every model.
        statistics: whether callers see how often each model was asked; `trident_client` asks that where its caller
            names no model.
        http_body_bytes: of a request over HTTP.
        grpc_body_bytes: of a `ModelInfer`.
        seconds: that a server gives to an answer (`limits.timeout` of its models).
        health_seconds: between two looks at each server.
        silence_seconds: that a server may leave a ping or a look unanswered.
        second_seconds: after which a request over HTTP that has got nothing is sent to a second server too; the first
            answer counts. HTTP has no ping that would tell a server that is frozen from a long answer.
        connections: of all callers together.
        admin_port: of Envoy's own pages on 127.0.0.1; 0: there are none.
        access_log: file; one line of JSON for each request.
    """

    servers: tuple[Server, ...]
    listen: str = "0.0.0.0"
    http_port: int = 9000
    grpc_port: int = 9001
    certificate: Path | None = None
    key: Path | None = None
    client_ca: Path | None = None
    models: tuple[str, ...] = ()
    statistics: bool = False
    http_body_bytes: int = 3 * MEBIBYTE
    grpc_body_bytes: int = 16 * MEBIBYTE
    seconds: float = 300
    health_seconds: float = 1
    silence_seconds: float = 5
    second_seconds: float = 30
    connections: int = 4096
    admin_port: int = 0
    access_log: str = "/dev/stdout"

    def __post_init__(self) -> None:
        if not self.servers:
            raise ValueError("there is no server: give --server")
        files = (self.certificate, self.key, self.client_ca)
        if None in files and not _is_loopback(self.listen):
            raise ValueError(
                f"{self.listen} can be reached from other machines: give --certificate, --key and --client-ca"
            )
        if None in files and any(files):
            raise ValueError("--certificate, --key and --client-ca go together")
        if not 0 < self.http_body_bytes <= 3 * MEBIBYTE + MEBIBYTE // 2:
            raise ValueError("a body over HTTP must be above 0 and at most 3.5 MiB: tritonserver 2.51 ends on 4 MiB")
        for name in self.models:
            if not re.fullmatch(r"[\w.-]+", name):
                raise ValueError(f"{name!r} is no name of a model")


def config(options: Options) -> Config:
    """The whole configuration."""
    found: Config = {}
    if options.admin_port:
        found["admin"] = {"address": _address("127.0.0.1", options.admin_port)}
    limit = {"@type": _type("resource_monitors.downstream_connections.v3.DownstreamConnectionsConfig")}
    monitor = {
        "name": "envoy.resource_monitors.global_downstream_max_connections",
        "typed_config": {**limit, "max_active_downstream_connections": options.connections},
    }
    found["overload_manager"] = {"resource_monitors": [monitor]}
    found["static_resources"] = {
        "listeners": [
            _listener(options, "grpc", options.grpc_port, _grpc_routes(options), [_buffer(options.grpc_body_bytes)]),
            _listener(
                options, "http", options.http_port, _http_routes(options), [_buffer(options.http_body_bytes), _lua(LUA)]
            ),
        ],
        "clusters": [_cluster(options, "grpc"), _cluster(options, "http")],
    }
    return found


def _listener(options: Options, name: str, port: int, routes: Sequence[Config], filters: Sequence[Config]) -> Config:
    grpc = name == "grpc"
    manager = {
        "stat_prefix": name,
        "codec_type": "HTTP2" if grpc else "AUTO",
        "use_remote_address": True,
        "preserve_external_request_id": True,
        "normalize_path": True,
        "merge_slashes": True,
        "path_with_escaped_slashes_action": "REJECT_REQUEST",
        "common_http_protocol_options": {
            "idle_timeout": "600s",
            "headers_with_underscores_action": "DROP_HEADER",  # see HIDDEN_HEADERS
        },
        "http2_protocol_options": {
            "max_concurrent_streams": 1000,
            "initial_stream_window_size": MEBIBYTE,
            "initial_connection_window_size": 16 * MEBIBYTE,
            "connection_keepalive": {"interval": "30s", "timeout": "20s"},
        },
        "stream_idle_timeout": _seconds(options.seconds + ANSWER_MARGIN),
        "request_headers_timeout": "10s",
        # A stream of gRPC may go on sending for as long as it lives.
        "request_timeout": "0s" if grpc else "30s",
        "access_log": [_access_log(options)],
        "http_filters": [*filters, _filter("http.router", "http.router.v3.Router", suppress_envoy_headers=True)],
        "route_config": {
            "name": name,
            "request_headers_to_remove": list(HIDDEN_HEADERS),
            "virtual_hosts": [{"name": name, "domains": ["*"], "routes": [*routes, _refusal({"prefix": "/"})]}],
        },
    }
    chain: Config = {
        "filters": [
            _filter(
                "network.http_connection_manager",
                "network.http_connection_manager.v3.HttpConnectionManager",
                **manager,
            )
        ]
    }
    if options.certificate is not None:
        chain["transport_socket"] = _tls(options, ["h2"] if grpc else ["h2", "http/1.1"])
    return {
        "name": name,
        "address": _address(options.listen, port),
        # What a request has sent is kept up to here, to be sent again to another server.
        "per_connection_buffer_limit_bytes": options.grpc_body_bytes if grpc else options.http_body_bytes,
        "filter_chains": [chain],
    }


def _tls(options: Options, protocols: Sequence[str]) -> Config:
    return {
        "name": "envoy.transport_sockets.tls",
        "typed_config": {
            "@type": _type("transport_sockets.tls.v3.DownstreamTlsContext"),
            "require_client_certificate": True,
            "common_tls_context": {
                "alpn_protocols": list(protocols),
                "tls_params": {"tls_minimum_protocol_version": "TLSv1_2"},
                "tls_certificates": [
                    {
                        "certificate_chain": {"filename": str(options.certificate)},
                        "private_key": {"filename": str(options.key)},
                    }
                ],
                "validation_context": {"trusted_ca": {"filename": str(options.client_ca)}},
            },
        },
    }


def _grpc_routes(options: Options) -> list[Config]:
    questions = [*QUESTIONS, *([STATISTICS] if options.statistics else [])]
    routes = [_route("grpc", {"path": SERVICE + name}, QUESTION_SECONDS) for name in questions]
    routes.append(_route("grpc", {"path": HEALTH}, QUESTION_SECONDS))
    once = _route("grpc", {"path": SERVICE + "ModelInfer"}, options.seconds + ANSWER_MARGIN)
    # A stream may carry many requests, one after the other: time counts while nothing comes, and nothing is held back
    # until its end.
    stream = _route("grpc", {"path": SERVICE + "ModelStreamInfer"}, 0)
    stream["route"]["idle_timeout"] = _seconds(options.seconds + ANSWER_MARGIN)
    stream["typed_per_filter_config"] = {
        "envoy.filters.http.buffer": {"@type": _type("filters.http.buffer.v3.BufferPerRoute"), "disabled": True}
    }
    return [*routes, once, stream]


def _http_routes(options: Options) -> list[Config]:
    model = f"(?:{'|'.join(map(re.escape, options.models))})" if options.models else r"[\w.-]+"
    model += r"(?:/versions/\d+)?"
    paths = {
        ("GET", r"/v2/health/(?:live|ready)"): QUESTION_SECONDS,
        ("GET", rf"/v2/models/{model}(?:/ready|/config)?"): QUESTION_SECONDS,
        ("POST", rf"/v2/models/{model}/(?:infer|generate|generate_stream)"): options.seconds + ANSWER_MARGIN,
    }
    first: list[Config] = []
    if options.statistics:
        paths["GET", rf"/v2/models(?:/{model})?/stats"] = QUESTION_SECONDS
    else:  # which else would be a model's name
        first = [_refusal({"path": "/v2/models/stats"})]
    routes = [
        _route("http", {"safe_regex": {"regex": path}, "headers": [_is(":method", method)]}, seconds)
        for (method, path), seconds in paths.items()
    ]
    for route in routes:
        route["route"]["retry_policy"]["per_try_timeout"] = _seconds(options.second_seconds)
        route["route"]["hedge_policy"] = {"hedge_on_per_try_timeout": True}
    return [*first, *routes]


def _is(header: str, value: str) -> Config:
    return {"name": header, "string_match": {"exact": value}}


def _route(cluster: str, match: Config, seconds: float) -> Config:
    return {
        "match": match,
        "route": {
            "cluster": cluster,
            "timeout": _seconds(seconds),
            "idle_timeout": _seconds(seconds),
            "retry_policy": _retries(cluster),
        },
    }


def _retries(cluster: str) -> Config:
    """To ask a model changes nothing, so a request may be sent again as long as nothing of its answer has come.

    Once only: a request that ends a server would else end all of them.
    """
    conditions = "connect-failure,refused-stream,reset"
    other: Config = {"retry_on": f"{conditions},unavailable"}
    if cluster == "http":
        other = {"retry_on": f"{conditions},retriable-status-codes", "retriable_status_codes": [503]}
    return {
        **other,
        "num_retries": 1,
        "retry_back_off": {"base_interval": "0.025s", "max_interval": "0.25s"},
        "retry_host_predicate": [
            {
                "name": "envoy.retry_host_predicates.previous_hosts",
                "typed_config": {"@type": _type("retry.host.previous_hosts.v3.PreviousHostsPredicate")},
            }
        ],
        # A server that has just failed has the fewest requests, so it is often drawn.
        "host_selection_retry_max_attempts": 20,
    }


def _refusal(match: Config) -> Config:
    """A route that leads nowhere; Envoy makes it PERMISSION_DENIED for gRPC."""
    body = {"inline_string": "this proxy does not let that call through"}
    return {"match": match, "direct_response": {"status": 403, "body": body}}


def _cluster(options: Options, name: str) -> Config:
    grpc = name == "grpc"
    protocol: Config = {"http_protocol_options": {}}
    if grpc:
        # A server that is frozen, or a machine that is gone, answers no ping; one that drains does.
        ping = {"interval": "3s", "timeout": _seconds(options.silence_seconds)}
        protocol = {"http2_protocol_options": {"connection_keepalive": ping}}
    endpoints = [
        {"endpoint": {"address": _address(server.host, server.grpc_port if grpc else server.http_port)}}
        for server in options.servers
    ]
    return {
        "name": name,
        "cluster_type": {  # a name is looked up again and again; an address is one already
            "name": "envoy.cluster.dns",
            "typed_config": {"@type": _type("clusters.dns.v3.DnsCluster"), "dns_refresh_rate": "2s"},
        },
        "connect_timeout": "2s",
        "load_balancing_policy": {
            "policies": [
                {
                    "typed_extension_config": {
                        "name": "envoy.load_balancing_policies.least_request",
                        "typed_config": {"@type": _type("load_balancing_policies.least_request.v3.LeastRequest")},
                    }
                }
            ]
        },
        # By default a cluster with few healthy servers sends to all of them.
        "common_lb_config": {"healthy_panic_threshold": {"value": 0}},
        "health_checks": [_health_check(options, grpc)],
        "outlier_detection": {
            "split_external_local_origin_errors": True,
            "consecutive_local_origin_failure": 3,
            "interval": "1s",
            "base_ejection_time": "5s",
            "max_ejection_percent": 100,
            # A full queue is UNAVAILABLE too, which is no fault of the server.
            **{f"enforcing_{kind}": 0 for kind in ("consecutive_5xx", "consecutive_gateway_failure", "success_rate")},
            # Over HTTP a long answer counts as a failure, too (`second_seconds`).
            "enforcing_consecutive_local_origin_failure": 100 if grpc else 0,
        },
        "circuit_breakers": {
            "thresholds": [
                {
                    "max_requests": 4096,
                    "max_pending_requests": 1024,
                    # By default three: with a server, all of its requests are sent again.
                    "retry_budget": {"budget_percent": {"value": 50}, "min_retry_concurrency": 128},
                }
            ]
        },
        "typed_extension_protocol_options": {
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                "@type": _type("upstreams.http.v3.HttpProtocolOptions"),
                "common_http_protocol_options": {"idle_timeout": "60s"},
                "explicit_http_config": protocol,
                **({} if grpc else {"http_filters": [_lua(STATUS_LUA), _filter(*UPSTREAM)]}),
            }
        },
        "load_assignment": {"cluster_name": name, "endpoints": [{"lb_endpoints": endpoints}]},
    }


def _health_check(options: Options, grpc: bool) -> Config:
    interval = _seconds(options.health_seconds)
    check: Config = {"grpc_health_check": {}} if grpc else {"http_health_check": {"path": "/v2/health/ready"}}
    return {
        "timeout": _seconds(min(options.silence_seconds, 2)),
        "interval": interval,
        "no_traffic_interval": interval,
        "unhealthy_threshold": 2,
        "healthy_threshold": 1,
        **check,
    }


def _buffer(count: int) -> Config:
    """Reads a body whole, and refuses a larger one."""
    return _filter("http.buffer", "http.buffer.v3.Buffer", max_request_bytes=count)


def _lua(code: str) -> Config:
    return _filter("http.lua", "http.lua.v3.Lua", default_source_code={"inline_string": code})


def _access_log(options: Options) -> Config:
    """Neither bodies nor queries nor headers of callers, but for the request's id and the certificate's subject."""
    entries = {
        "time": "%START_TIME%",
        "method": "%REQ(:METHOD)%",
        "path": "%PATH(NQ)%",
        "protocol": "%PROTOCOL%",
        "status": "%RESPONSE_CODE%",
        "grpc_status": "%GRPC_STATUS%",
        "flags": "%RESPONSE_FLAGS%",
        "server": "%UPSTREAM_HOST%",
        "tries": "%UPSTREAM_REQUEST_ATTEMPT_COUNT%",
        "milliseconds": "%DURATION%",
        "first_byte_milliseconds": "%RESPONSE_DURATION%",
        "bytes_received": "%BYTES_RECEIVED%",
        "bytes_sent": "%BYTES_SENT%",
        "caller": "%DOWNSTREAM_PEER_SUBJECT%",
        "address": "%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT%",
        "request_id": "%REQ(X-REQUEST-ID)%",
    }
    return {
        "name": "envoy.access_loggers.file",
        "typed_config": {
            "@type": _type("access_loggers.file.v3.FileAccessLog"),
            "path": options.access_log,
            "log_format": {"json_format": entries},
        },
    }


def _filter(name: str, kind: str, **settings: Any) -> Config:
    return {
        "name": f"envoy.filters.{name}",
        "typed_config": {"@type": _type(f"filters.{kind}"), **settings},
    }


def _type(name: str) -> str:
    return f"type.googleapis.com/envoy.extensions.{name}"


def _address(host: str, port: int) -> Config:
    return {"socket_address": {"address": host, "port_value": port}}


def _seconds(seconds: float) -> str:
    return f"{seconds:g}s"


def _is_loopback(host: str) -> bool:
    return host == "localhost" or ipaddress.ip_address(host).is_loopback


def written(options: Options) -> str:
    """The configuration as a file."""
    text: str = yaml.safe_dump(config(options), sort_keys=False, width=120)
    return text


def parse(arguments: Sequence[str] | None = None) -> Options:
    """The options of a command line.

    Raises:
        ValueError: they make no sense together.
    """
    parser = argparse.ArgumentParser(prog="python deploy/envoy.py", description=__doc__.partition(":")[0])
    parser.add_argument("--server", action="append", default=[], help="HOST or HOST:HTTP_PORT:GRPC_PORT; repeat it")
    parser.add_argument("--listen", default=Options.listen, help="address for callers (default %(default)s)")
    parser.add_argument("--http-port", type=int, default=Options.http_port)
    parser.add_argument("--grpc-port", type=int, default=Options.grpc_port)
    parser.add_argument("--certificate", type=Path, help="PEM file of the proxy's certificate and its chain")
    parser.add_argument("--key", type=Path, help="PEM file of its key")
    parser.add_argument("--client-ca", type=Path, help="PEM file of the authorities of callers' certificates")
    parser.add_argument("--model", action="append", default=[], help="may be asked over HTTP (default: every model)")
    parser.add_argument("--statistics", action="store_true", help="let callers see how often each model was asked")
    parser.add_argument("--http-body-bytes", type=int, default=Options.http_body_bytes)
    parser.add_argument("--grpc-body-bytes", type=int, default=Options.grpc_body_bytes)
    parser.add_argument("--seconds", type=float, default=Options.seconds, help="the models' limits.timeout")
    parser.add_argument("--health-seconds", type=float, default=Options.health_seconds)
    parser.add_argument("--silence-seconds", type=float, default=Options.silence_seconds)
    parser.add_argument(
        "--second-seconds",
        type=float,
        default=Options.second_seconds,
        help="after which a request over HTTP without an answer is sent to a second server too (default %(default)g)",
    )
    parser.add_argument("--connections", type=int, default=Options.connections, help="of all callers together")
    parser.add_argument("--admin-port", type=int, default=0, help="Envoy's own pages, on 127.0.0.1 (default: none)")
    parser.add_argument("--access-log", default=Options.access_log)
    given = vars(parser.parse_args(arguments))
    servers = tuple(Server.parse(text) for text in given.pop("server"))
    return Options(servers=servers, models=tuple(given.pop("model")), **given)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a configuration; returns the exit status."""
    try:
        print(written(parse(arguments)), end="")
    except ValueError as error:
        print(f"trident: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
