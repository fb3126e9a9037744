"""The weight update: a transaction that carries named tensors from the trainer into a running engine, whole or not.

    pause -> begin -> buckets -> finish -> check -> commit(version) -> reset prefix cache -> resume

`manifest` says what must arrive, `bucket` lays tensors out in memory, `shm` shares that memory between processes of one
host, `sender` and `receiver` are the two ends, `update` drives them.
"""
