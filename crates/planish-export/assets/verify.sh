#!/bin/sh
# Checks this export on a Mac: ./verify.sh [FOLDER OF THE PACKAGES]
# Compiles each package, then runs verify.swift, which writes result.json. Needs macOS 15 and Xcode's command line tools.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
packages=$(cd "${1:-$here/..}" && pwd)
compiled=$(mktemp -d)
trap 'rm -rf "$compiled"' EXIT
sed -n 's/^ *"\([^"]*\.mlpackage\)".*/\1/p' "$here/expected.json" | while read -r name; do
    echo "compiling $name"
    xcrun coremlcompiler compile "$packages/$name" "$compiled"
    find "$packages/$name" -type f -exec shasum -a 256 {} +
done
sysctl -n machdep.cpu.brand_string
swiftc -O -o "$compiled/verify" "$here/verify.swift"
"$compiled/verify" "$here" "$compiled"
