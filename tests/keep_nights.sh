#!/usr/bin/env bash
# Commit the nights of a folder to a branch that holds nothing else, and push it. Nights that are there are left alone.
#
#     tests/keep_nights.sh FOLDER BRANCH
set -euo pipefail
nights=$(cd "$1" && pwd)
branch=$2

worktree=$(mktemp -d)
trap 'git worktree remove --force "$worktree"; git worktree prune' EXIT
found=0
git ls-remote --exit-code --heads origin "$branch" >/dev/null || found=$?
case $found in
    0)
        git fetch --depth 1 origin "$branch"
        git worktree add --force --detach "$worktree" FETCH_HEAD
        ;;
    2)
        git worktree add --force --detach "$worktree"
        git -C "$worktree" checkout --orphan "$branch"
        git -C "$worktree" rm -r --force --quiet .
        ;;
    *) exit "$found" ;;
esac
for night in "$nights"/[0-9]*.json; do
    [ -e "$worktree/$(basename "$night")" ] || cp "$night" "$worktree"
done
git -C "$worktree" add --all
if git -C "$worktree" diff --cached --quiet; then
    echo "no new night"
    exit 0
fi
git -C "$worktree" -c user.name="evenbits nightly" -c user.email="nightly@users.noreply.github.com" \
    commit --quiet --message "Night of $(date -u +%F)"
# from here: the credentials that actions/checkout leaves are found for its own folder, not surely for a worktree
git push --quiet origin "$(git -C "$worktree" rev-parse HEAD):refs/heads/$branch"
