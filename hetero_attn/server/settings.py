"""What the operator of a server decides: where it listens, who may ask, how much it takes on."""

from dataclasses import dataclass
from ipaddress import ip_address

from hetero_attn.errors import ArgumentError

LOCAL_NAMES = ("localhost", "127.0.0.1", "[::1]")


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """The settings of one server.

    host, port: where it listens; port 0 takes any free one. api_key: what clients must present; None only on loopback.
    served_name: the model's name to clients, None for its own. max_waiting: requests that wait for a place before
    others are refused. ping_interval_s: silence after which a stream is kept alive, 0 for never. allowed_hosts,
    allowed_origins: beside loopback's names and the page's own origin. drain_s: how long a stop waits for what runs.
    has_page: whether `/` is a page for people. body_bytes, body_s, depth: limits of a request's body. blocked_s: how
    long a client may read nothing.

    Raises ArgumentError where others could reach the server without a key.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    served_name: str | None = None
    max_waiting: int = 256
    ping_interval_s: float = 15.0
    allowed_hosts: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    drain_s: float = 30.0
    has_page: bool = True
    body_bytes: int = 8 << 20
    body_s: float = 30.0
    depth: int = 64
    blocked_s: float = 60.0

    def __post_init__(self) -> None:
        if not self.is_local and not self.api_key:
            raise ArgumentError(
                f"host is {self.host}, where others can reach it, and no key is set; give one with --api-key-file, or "
                "listen on 127.0.0.1"
            )
        if self.max_waiting < 0 or self.ping_interval_s < 0:
            raise ArgumentError(
                f"max_waiting is {self.max_waiting} and ping_interval_s {self.ping_interval_s}; both must be at least 0"
            )

    @property
    def address(self) -> str:
        """Where clients find the server."""
        return f"http://[{self.host}]:{self.port}" if ":" in self.host else f"http://{self.host}:{self.port}"

    @property
    def is_local(self) -> bool:
        """Whether only this machine reaches the server."""
        try:
            return self.host == "localhost" or ip_address(self.host).is_loopback
        except ValueError:
            return False
