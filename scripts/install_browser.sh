#!/usr/bin/env bash
# Debian's Chromium with its driver, in which the tests open the report. Nothing to do where both are there already.
set -euo pipefail
if command -v chromium > /dev/null && command -v chromedriver > /dev/null; then exit 0; fi
apt-get -qq update
DEBIAN_FRONTEND=noninteractive apt-get -qq install --yes --no-install-recommends chromium chromium-driver > /dev/null
