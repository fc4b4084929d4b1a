# Sourced by the others: LAB is where everything lies, HERE this folder, ROOT the repository.
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
ROOT=$(cd "$HERE/../.." && pwd)
LAB=$(mkdir -p "${LAB:-$ROOT/target/compose}" && cd "${LAB:-$ROOT/target/compose}" && pwd)
IMAGES=${IMAGES:-standins}
if [ "$IMAGES" = standins ]; then
  export DOCKER_HOST=unix://$LAB/docker.sock DOCKER_CONFIG=$LAB/config
  mkdir -p "$LAB/bin" "$DOCKER_CONFIG/cli-plugins"
  [ -e "$DOCKER_CONFIG/config.json" ] || echo '{}' >"$DOCKER_CONFIG/config.json"
fi

# step NAME COMMAND…: runs it, prints how long it took.
step() {
  local name=$1 begin=$SECONDS
  shift
  "$@" || { echo "FAIL $name" >&2; return 1; }
  printf 'ok   %-64s %4d s\n' "$name" $((SECONDS - begin))
}
