"""How any run runs: tasks over threads or a cluster, devices, the workspace, the record, stores."""
