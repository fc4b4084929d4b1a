# What `up` and `down` share: where things lie, and which processes are ours. Sourced, not run.

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
REPOSITORY=$(cd "$HERE/../.." && pwd)
STACK=${LEDGERLINE_STACK_DIR:-$REPOSITORY/.stack}
PARTS="postgres kafka connect minio mail snowflake"

say() { echo "stack: $*" >&2; }
fail() { say "$*"; exit 1; }

# When a process started: with its pid, what makes it this process and no later one of the same number. Empty for a zombie.
started_at() { ps -o stat=,lstart= -p "$1" 2>/dev/null | sed -n 's/^[^Z ][^ ]* *//p'; }

# The pid of a part that runs.
pid_of() {
  local pid started
  { read -r pid && read -r started; } 2>/dev/null <"$STACK/run/$1" || return 1
  [ "$(started_at "$pid")" = "$started" ] && echo "$pid"
}

# One `up` or `down` at a time. What is started gets the lock's descriptor closed, or it would hold the lock.
one_at_a_time() {
  exec 9>"$STACK/lock"
  flock -n 9 || { say "another up or down is at work, waiting"; flock 9; }
}
