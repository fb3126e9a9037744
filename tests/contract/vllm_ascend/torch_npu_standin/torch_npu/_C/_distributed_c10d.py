"""HCCL's process group, by name only: collectives run on gloo here."""


class ProcessGroupHCCL:
    """Cannot be made."""

    class Options:
        """Its options, which may be made and filled in."""

        def __init__(self):
            self.hccl_config = {}

    def __init__(self, *_, **__):
        raise NotImplementedError("the stand-in has no HCCL; use gloo")
