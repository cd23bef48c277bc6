"""File system for Ray Train that checks the fence of the run's lease before every write.

Ray Train itself uploads checkpoints, removes older ones and rewrites its list of them, in workers and in its
controller. All of these writes go through one Arrow file system, so that is where the fence is checked.
"""

from typing import Any

from pipelines.outputs.lease import Fence
from pipelines.storage.filesystem import ArrowHandler


class FencedHandler(ArrowHandler):
    """Handler for Arrow's `PyFileSystem` that refuses all writes once the lease is lost.

    Args:
        uri: Any URI of the store.
        fence: Fence of the run's lease.
    """

    def __init__(self, uri: str, fence: Fence) -> None:
        super().__init__(uri)
        self._fence = fence

    def __reduce__(self) -> tuple[Any, ...]:
        return FencedHandler, (self._uri, self._fence)

    def create_dir(self, path: str, recursive: bool) -> None:
        """Create a folder."""
        self._fence.check()
        super().create_dir(path, recursive)

    def delete_dir(self, path: str) -> None:
        """Delete a folder and its contents."""
        self._fence.check()
        super().delete_dir(path)

    def delete_dir_contents(self, path: str, missing_dir_ok: bool = False) -> None:
        """Delete the contents of a folder."""
        self._fence.check()
        super().delete_dir_contents(path, missing_dir_ok)

    def delete_file(self, path: str) -> None:
        """Delete a file."""
        self._fence.check()
        super().delete_file(path)

    def move(self, src: str, dest: str) -> None:
        """Move a file or folder."""
        self._fence.check()
        super().move(src, dest)

    def copy_file(self, src: str, dest: str) -> None:
        """Copy a file."""
        self._fence.check()
        super().copy_file(src, dest)

    def open_output_stream(self, path: str, metadata: Any) -> Any:
        """Open a file for writing."""
        self._fence.check()
        return super().open_output_stream(path, metadata)

    def open_append_stream(self, path: str, metadata: Any) -> Any:
        """Open a file for appending."""
        self._fence.check()
        return super().open_append_stream(path, metadata)
