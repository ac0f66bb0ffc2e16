#!/bin/bash
# PAGE WIDTH OUT HEIGHT
chromium --headless --no-sandbox --disable-gpu --hide-scrollbars --window-size=$2,$4 --screenshot=$3 file:///tmp/site/site/$1 >/dev/null 2>&1
