"""What launchers set, as it was seen, and what the tests of environments ask of it."""

# srun --nodes=2 --ntasks-per-node=2, the fourth task; as srun(1) documents its variables
SLURM = {
    "SLURM_JOB_ID": "1234567",
    "SLURM_JOB_NAME": "train",
    "SLURM_STEP_ID": "0",
    "SLURM_NTASKS": "4",
    "SLURM_NTASKS_PER_NODE": "2",
    "SLURM_NNODES": "2",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_NODELIST": "gpu[07-08]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
}
# mpirun of Open MPI 5.0.11, one of three processes on one machine, as it was seen: rank 1 is local rank 2
OMPI = {
    "OMPI_COMM_WORLD_SIZE": "3",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "3",
    "OMPI_COMM_WORLD_LOCAL_RANK": "2",
    "OMPI_COMM_WORLD_NODE_RANK": "2",
    "OMPI_UNIVERSE_SIZE": "3",
    "PMIX_NAMESPACE": "prterun-vm-10031@1",
    "PMIX_RANK": "1",
}
# mpiexec of MPICH 5.0.2 over two machines, as it was seen
MPICH = {"PMI_RANK": "1", "PMI_SIZE": "2", "PMI_FD": "9", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "1"}
# submitit 1.5's LocalExecutor, tasks_per_node=2, the second task
SUBMITIT = {"SUBMITIT_EXECUTOR": "local", "SUBMITIT_LOCAL_JOB_ID": "12345", "SUBMITIT_LOCAL_NTASKS": "2"}
SUBMITIT |= {"SUBMITIT_LOCAL_GLOBALID": "1", "SUBMITIT_LOCAL_LOCALID": "1"}
KUBEFLOW = {"MASTER_ADDR": "job-master-0", "MASTER_PORT": "23456", "WORLD_SIZE": "4", "RANK": "3"}
LSF = {"LSB_JOBID": "123456", "JSM_NAMESPACE_RANK": "5", "JSM_NAMESPACE_SIZE": "6", "JSM_NAMESPACE_LOCAL_RANK": "2"}
ELASTIC = {"TORCHELASTIC_RUN_ID": "x", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "GROUP_WORLD_SIZE": "2"}
ELASTIC = {**KUBEFLOW, **ELASTIC, "GROUP_RANK": "1"}


def place(topology):
    """All that says which process this is."""
    ranks = (topology.rank, topology.world_size, topology.local_rank, topology.local_world_size)
    return (topology.name, *ranks, topology.node_rank, topology.num_nodes)


def without(environ, *names):
    return {name: value for name, value in environ.items() if name not in names}
