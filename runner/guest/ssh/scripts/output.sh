end_with_host
number= # of the file that is read
from=0  # bytes of it that were printed
while :; do
	look # before reading: what is printed later is not from this runner
	for log in "$state"/log.*; do
		[ -f "$log" ] || continue
		this=${log##*.}
		if [ "$this" != "$number" ]; then
			[ -z "$number" ] || [ "$this" -gt "$number" ] || continue
			number=$this from=0
		fi
		size=$(wc -c 2>/dev/null <"$log") || continue
		size=$((size + 0))
		[ "$size" -gt "$from" ] || continue
		tail -c "+$((from + 1))" "$log" 2>/dev/null | head -c "$((size - from))"
		from=$size
	done
	[ "$phase" != exited ] || exit 0
	nap
done
