# Draws the losses that ./ladder wrote to DIR/losses.csv and DIR/curves.csv:
#     gnuplot -c dev/ladder/ladder.gp DIR         writes DIR/bars.png and DIR/curves.png
set datafile separator ","
set terminal pngcairo size 1100,650 font "sans,12"
set grid y
dir = ARG1

# The final losses: two bars for each rung, with the spread over seeds and the original post's losses.
losses = dir . "/losses.csv"
set output dir . "/bars.png"
set title "Each rung's loss (the axis begins at 1.5)"
set xlabel "rung"
set ylabel "loss, nats per character"
set xrange [-0.6:7.6]
set yrange [1.5:*]
set style fill solid 0.85 noborder
set boxwidth 0.36
set xtics 1
set key top right
plot losses skip 1 using ($1 - 0.2):2 with boxes lc rgb "#2b6cb0" title "train", \
     "" skip 1 using ($1 + 0.2):4 with boxes lc rgb "#c53030" title "validation", \
     "" skip 1 using ($1 - 0.2):2:3 with yerrorbars ps 0 lc rgb "black" notitle, \
     "" skip 1 using ($1 + 0.2):4:5 with yerrorbars ps 0 lc rgb "black" notitle, \
     "" skip 1 using ($1 - 0.2):6 with points pt 6 lc rgb "black" title "the post, train", \
     "" skip 1 using ($1 + 0.2):7 with points pt 7 lc rgb "black" title "the post, validation"

# The validation losses during training, for the first seed of each rung.
curves = dir . "/curves.csv"
set output dir . "/curves.png"
set title "Validation loss as the rungs learn"
set xlabel "step"
set xrange [*:*]
set yrange [*:3.2]
set xtics auto
seed = real(system(sprintf("sed -n 2p '%s' | cut -d, -f2", curves)))
rungs = system(sprintf("tail -n +2 '%s' | cut -d, -f1 | uniq", curves))
plot for [k in rungs] sprintf("<awk -F, '$1 == %s && $2 == %.0f' '%s'", k, seed, curves) \
     using 3:5 with lines lw 2 title "rung " . k
