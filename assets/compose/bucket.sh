#!/bin/sh
# Makes the bucket of the lake, and a user who may read and write it and nothing else. Safe to repeat.
# The administrator comes as MC_HOST_minio, the user as LAKE_ACCESS_KEY_ID and LAKE_SECRET_ACCESS_KEY.
set -eu
mc mb --ignore-existing minio/lake
# From its input: arguments are for everyone to see.
printf '%s\n%s\n' "$LAKE_ACCESS_KEY_ID" "$LAKE_SECRET_ACCESS_KEY" | mc admin user add minio >/dev/null
mc admin policy create minio lake /assets/lake-policy.json
# Attaching twice is an error there.
mc admin user info minio "$LAKE_ACCESS_KEY_ID" | grep -q '^PolicyName: *lake$' || mc admin policy attach minio lake --user "$LAKE_ACCESS_KEY_ID"
