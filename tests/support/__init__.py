"""What the tests share: network namespaces, a proxy that breaks the wire. Not part of the package."""
