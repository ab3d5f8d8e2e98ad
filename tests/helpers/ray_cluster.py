"""A Ray cluster of two nodes on this machine, of which one can be killed: `python -m tests.helpers.ray_cluster`.

Prints its address, and the folder of its logs. Each line on standard input kills the second node, or starts it again;
at its end the cluster ends.
"""

import sys
from typing import Any

from ray.cluster_utils import Cluster

NODE: dict[str, Any] = {"num_cpus": 1, "object_store_memory": 100 * 2**20, "include_dashboard": False}


def main() -> None:
    """Run the cluster until standard input ends."""
    cluster = Cluster(initialize_head=True, head_node_args={**NODE, "labels": {"place": "first"}})
    second = cluster.add_node(**NODE, labels={"place": "second"}, resources={"scratch": 1})
    cluster.wait_for_nodes()
    print(cluster.address, cluster.head_node.get_session_dir_path(), flush=True)
    for _ in sys.stdin:
        if second is None:
            second = cluster.add_node(**NODE, labels={"place": "second"}, resources={"scratch": 1})
        else:
            cluster.remove_node(second, allow_graceful=False)
            second = None
        print("done", flush=True)
    cluster.shutdown()


if __name__ == "__main__":
    main()
