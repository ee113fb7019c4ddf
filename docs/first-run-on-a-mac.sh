#!/bin/sh
# Collects what docs/first-run-on-a-mac.md asks for into one file. Needs no rights and changes no tracked file.
set -u
cd "$(dirname "$0")/.." || exit 1

if [ "$(uname -s)" != Darwin ]; then
  echo "This is not a Mac; nothing to do." >&2
  exit 2
fi

out=target/first-run
rm -rf "$out"
mkdir -p "$out"

# Runs a command, keeps its output and its status, and goes on whatever happened: a failure is what we want to see.
step() {
  name=$1
  shift
  printf '%s … ' "$name"
  "$@" >"$out/$name.log" 2>&1
  status=$?
  echo "$name: exit status $status" >>"$out/summary.txt"
  echo "exit status $status"
}

git rev-parse HEAD >"$out/commit.txt" 2>&1
step preflight cargo xtask metal-check --preflight
step metal-check cargo xtask metal-check --out "$out/metal-check"
step build cargo build --release -p planish-cli
step doctor target/release/planish doctor --deep --no-probe-cache
step doctor-json target/release/planish doctor --deep --json
cp "$out/doctor-json.log" "$out/doctor.json"
step tests cargo test --release -p planish-mlx -p planish-backend

# Reports and logs only: builds are large and of no use elsewhere.
find "$out" -type d \( -name target -o -name metallib -o -name crate \) -prune -exec rm -rf {} +
find "$out" -type f \( -name '*.log' -o -name '*.json' -o -name '*.jsonl' -o -name '*.md' -o -name '*.xml' -o -name '*.txt' \) |
  while read -r file; do
    LC_ALL=C sed -e "s|$HOME|~|g" -e "s|$(id -un)|<user>|g" "$file" >"$file.clean" && mv "$file.clean" "$file"
  done
tar czf planish-first-run.tar.gz -C target first-run
cat "$out/summary.txt"
echo "Please send planish-first-run.tar.gz with an issue; look inside first: tar tzf planish-first-run.tar.gz"
