"""Black-box tests of the HTTP server over loopback."""
