"""`make load`: throughput and latency of every served model, over gRPC, HTTP and the gateway, each answer verified."""
