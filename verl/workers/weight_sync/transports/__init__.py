"""Transports: how a bucket gets from the trainer's node to each replica.

    base                 the interface `Transport`, and `Node`
    create               chooses one by `checkpoint_engine.backend`
    shared_memory        `naive`: replicas on the trainer's node map its memory
    collective           `nccl`, `hccl`, `gloo`: one broadcast per bucket to every other node, through the next two
    broadcast_proxy      the process of one node that sends or receives these broadcasts
    ray_broadcast_proxy  the same process as a Ray actor
    nodes                the Ray node on which a process runs

To add a transport, implement `Transport` in a file here and return it from `create.create_transport`.
"""
