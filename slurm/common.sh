# What the batch scripts share; sourced from the root of the project.

# on_nodes: srun's options for where the ranks run, a container that sees this folder or the environment.
# CONTAINER, MOUNTS and VENV as the scripts say; arguments are further paths the container has to see.
where_they_run() {
    on_nodes=(--cpu-bind=none)
    if [ -n "${CONTAINER-}" ]; then
        local mounts=$PWD:$PWD${MOUNTS:+,$MOUNTS} path
        for path in "$@"; do
            case $path in /*) mounts+=,$path:$path ;; esac
        done
        on_nodes+=("--container-image=$CONTAINER" "--container-workdir=$PWD" "--container-mounts=$mounts")
    elif [ -d "${VENV:=.venv}/bin" ]; then
        case $VENV in /*) ;; *) VENV=$PWD/$VENV ;; esac
        export PATH="$VENV/bin:$PATH"
    fi
}

# In the background, so that traps run while the step does. Returns the step's exit code.
run_step() {
    srun "${on_nodes[@]}" "$@" &
    local step=$! code
    while true; do
        code=0
        wait "$step" || code=$?
        kill -0 "$step" 2>/dev/null || return "$code" # else a signal ended the wait, not the step
    done
}
