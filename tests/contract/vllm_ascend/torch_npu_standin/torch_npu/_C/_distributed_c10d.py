"""HCCL's process group as a name only: collectives use gloo."""


class ProcessGroupHCCL:
    """A class that cannot be instantiated."""

    class Options:
        """Its options, which can be created and set."""

        def __init__(self):
            self.hccl_config = {}

    def __init__(self, *_, **__):
        raise NotImplementedError("the stand-in has no HCCL; use gloo")
