#!/bin/sh
# Draws the validation losses of several runs in one plot, and, dotted, their smoothed training losses:
#
#     dev/plot/compare.sh steps|tokens|seconds IMAGE DIR...
#
# IMAGE ends in .png or .svg. Each DIR is a run's folder with log.csv; runs that lie in one folder are
# labelled by their names alone. Tokens and seconds are those of training, summed over the steps.
set -e
[ $# -ge 3 ] || { echo "usage: dev/plot/compare.sh steps|tokens|seconds IMAGE DIR..." >&2; exit 2; }
axis=$1 image=$2
shift 2
case $axis in
steps | tokens | seconds) ;;
*) echo "compare.sh: the axis is '$axis', wanted steps, tokens or seconds" >&2; exit 2 ;;
esac
case $image in
*.png) terminal=pngcairo ;;
*.svg) terminal=svg ;;
*) echo "compare.sh: $image: wanted a name that ends in .png or .svg" >&2; exit 2 ;;
esac
together=yes  # all runs lie in one folder
highest=0     # the plot's top: the highest validation loss after step 0, whose own would flatten the curves
for dir; do
    [ "$(dirname "$dir")" = "$(dirname "$1")" ] || together=
    [ "$(cat "$dir/log.csv" 2>/dev/null | wc -l)" -ge 2 ] ||
        { echo "compare.sh: $dir/log.csv is missing or has no rows" >&2; exit 1; }
    highest=$(awk -F, -v highest=$highest 'NR > 1 && $1 > 0 && $4 != "" && $4 + 0 > highest { highest = $4 }
        END { print highest }' "$dir/log.csv")
done
command -v gnuplot >/dev/null ||
    { echo "compare.sh: gnuplot is missing; install it with: sudo apt-get install gnuplot-nox" >&2; exit 1; }
part=$image.part  # renamed when it is complete, so that a failure leaves an earlier image
(: >"$part") 2>/dev/null || { echo "compare.sh: $image: cannot write" >&2; exit 1; }

# One text in gnuplot's single quotes
quoted() { printf "'%s'" "$(printf %s "$1" | sed "s/'/''/g")"; }
{
    echo "set terminal $terminal size 1100,650 font 'sans,12' background 'white'"
    echo "set output $(quoted "$part")"
    echo "set xlabel '$axis of training'; set ylabel 'loss, nats per token'; set grid; set key top right"
    echo 'set datafile missing "?"; set autoscale xfix; set format x "%.0s%c"'
    [ "$highest" = 0 ] || echo "set yrange [*:$highest]"
    plot=plot i=0
    for dir; do
        i=$((i + 1)) label=$dir
        [ -z "$together" ] || label=$(basename "$dir")
        every=$(($(wc -l <"$dir/log.csv") / 100 + 1))  # so that an .svg stays small
        # x, smoothed training loss, validation loss
        echo "\$run$i << END"
        awk -F, -v axis="$axis" 'NR > 1 {
            if ($8 != "") seconds += $8 / 1000
            if ($8 != "") tokens += $8 / 1000 * $9
            x = axis == "steps" ? $1 : axis == "tokens" ? tokens + 0 : seconds + 0
            print x, $3 == "" ? "?" : $3, $4 == "" ? "?" : $4
        }' "$dir/log.csv"
        echo END
        plot="$plot \$run$i using 1:2 every $every with lines lc $i dt 3 notitle, \
\$run$i using 1:3 with linespoints lw 2 lc $i pt 7 ps 0.6 title $(quoted "$label") noenhanced,"
    done
    echo "${plot%,}"
} | gnuplot || { rm -f "$part"; exit 1; }
mv "$part" "$image"
