"""Joining a running Ray cluster, with errors that say what to do."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from typing import Any

from ganexport.errors import BackendUnavailableError, MissingDependencyError


def load_ray(what: str, extra: str) -> Any:
    """The package ``ray``, which must not call home.

    Args:
        what: Needs it, for the message.
        extra: Of ganexport that brings it.

    Raises:
        MissingDependencyError: It is not installed.
    """
    # Unless told otherwise Ray reports usage to its makers; nothing of ours calls home.
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    try:
        import ray
    except ImportError:
        raise MissingDependencyError(f"{what} needs Ray: pip install 'ganexport[{extra}]'") from None
    return ray


#: How Ray Serve carries a request: straight to the replica instead of through the object store, on the event loops
#: that are there already, which is less work for each request; whoever sets one of these is obeyed.
TRANSPORT = {
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
}


def load_serve() -> tuple[Any, Any]:
    """The packages ``ray`` and ``ray.serve``, with :data:`TRANSPORT`, which is read when they are imported.

    Raises:
        MissingDependencyError: It is not installed.
    """
    for name, value in TRANSPORT.items():
        os.environ.setdefault(name, value)
    ray = load_ray("serving", "serve")
    try:
        from ray import serve
    except ImportError as error:
        raise MissingDependencyError(
            f"serving needs the package {error.name}: pip install 'ganexport[serve]'"
        ) from None
    return ray, serve


def join(ray: Any, address: str, variables: Mapping[str, str]) -> None:
    """Connect this process to a cluster.

    Args:
        ray: From :func:`load_ray`.
        address: "host:port", "ray://host:port" or "auto".
        variables: Environment of its workers.

    Raises:
        BackendUnavailableError: Nothing answers there, or it cannot be joined.
    """
    _reach(address)
    try:
        ray.init(address=address, runtime_env={"env_vars": dict(variables)}, **QUIET)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise BackendUnavailableError(
            f"no Ray cluster can be joined at {address}: {str(error).strip().splitlines()[0]}; "
            "start one with: ray start --head, and where it has a token, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN"
        ) from None


#: Options of ``ray.init``: its remarks are not for the user.
QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "namespace": "ganexport"}


def _reach(address: str) -> None:
    """Refuse an address where nothing listens; Ray itself would go on trying for many minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return  # "auto" and the like: Ray finds it
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except (OSError, OverflowError) as error:
        raise BackendUnavailableError(
            f"no Ray cluster answers at {address}: {error}; start one with: ray start --head"
        ) from None
