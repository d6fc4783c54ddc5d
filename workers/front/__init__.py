"""The group's front: admission and streams of requests, no GPU work."""
