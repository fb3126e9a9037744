"""The weight update: a transaction that carries named tensors from the trainer into running engines.

Read `driver` first. The files, from the driver to the two ends and to what travels between them:

    driver         one update: pause, begin, buckets, finish, check, commit
    updater        all updates of a run: a delta or a full update
    delta_checks   every reason to refuse a delta

    sender         the trainer's end: tensors or delta blocks -> buckets
    last_sent      the weights that a trainer rank sent last, and their changes
    block_gather   the changes of all ranks -> rank 0
    receiver       the engine's end: buckets -> vLLM (verl/utils/vllm/{reload,delta}.py)

    messages       all messages between these processes
    manifest       names, shapes and dtypes of a full update, and the check that all were received
    bucket         tensors in one block of bytes
    delta          the wire format of changed elements
    shm            memory shared by the processes of one host
    transports/    the ways of a bucket to replicas on other nodes; add a transport there
"""
