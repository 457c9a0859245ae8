#!/bin/sh
# In CI, as root on Debian or Ubuntu: install what the tests need of the system. Elsewhere those tests skip and say so.
set -eu
[ "${CI:-}" = true ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || exit 0
missing=
while read -r package; do
    dpkg -s "$package" >/dev/null 2>&1 || missing="$missing $package"
done <"$(dirname "$0")/apt.txt"
[ -z "$missing" ] && exit 0
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
# shellcheck disable=SC2086
apt-get install -qq -y --no-install-recommends $missing >/dev/null
