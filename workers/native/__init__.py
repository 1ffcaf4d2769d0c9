"""A native decoder for common families on CPUs with AMX, on the shared weights as they lie."""

from workers.native.architecture import NotNative, PagedLayout
from workers.native.decoder import NativeDecoder, supports
from workers.native.library import Unavailable

__all__ = ["NativeDecoder", "NotNative", "PagedLayout", "Unavailable", "supports"]
