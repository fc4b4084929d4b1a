#!/bin/bash
# The image's contract as far as it is used: its own names for seven settings, CONNECT_A_B is a.b, HEAP_OPTS.
set -e
[ "$1" = start ] || exec "$@"
json=org.apache.kafka.connect.json.JsonConverter
declare -A settings=(
  [bootstrap.servers]=${BOOTSTRAP_SERVERS:?} [group.id]=${GROUP_ID:-1}
  [config.storage.topic]=${CONFIG_STORAGE_TOPIC:?} [offset.storage.topic]=${OFFSET_STORAGE_TOPIC:?} [status.storage.topic]=${STATUS_STORAGE_TOPIC:-connect-status}
  [key.converter]=${KEY_CONVERTER:-$json} [value.converter]=${VALUE_CONVERTER:-$json}
  [offset.flush.interval.ms]=${OFFSET_FLUSH_INTERVAL_MS:-60000}
  [listeners]=http://0.0.0.0:8083 [rest.advertised.host.name]=$(hostname -i | cut -d' ' -f1)
)
while IFS='=' read -r name value; do
  case $name in CONNECT_*) name=${name#CONNECT_} name=${name//_/.}; settings[${name,,}]=$value ;; esac
done < <(env)
for name in "${!settings[@]}"; do echo "$name=${settings[$name]}"; done >/kafka/config/connect-distributed.properties
exec java ${HEAP_OPTS:--Xmx512m} -XX:+UseSerialGC -XX:TieredStopAtLevel=1 -Dlog4j2.level=warn -cp "/kafka/libs/*" \
  org.apache.kafka.connect.cli.ConnectDistributed /kafka/config/connect-distributed.properties
