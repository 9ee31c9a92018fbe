"""The MCP door: the operations that an LLM agent needs, as tools. Importing this loads no torch."""

__all__ = ["build_server"]


def __getattr__(name: str):
    # FastMCP costs half a second to import, which `mistudio --help` should not pay for.
    if name == "build_server":
        from mistudio_mcp.server import build_server

        return build_server
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
