# Draws a run's losses: gnuplot -c dev/plot/loss.gp out/log.csv out/loss.png
set datafile separator ","
set terminal pngcairo size 1100,650 font "sans,12"
set output ARG2
set title ARG1
set xlabel "step"
set ylabel "loss, nats per token"
set grid
set key top right
csv = ARG1
validated = sprintf("<awk -F, 'NR > 1 && $4 != \"\" {print $1 \",\" $4}' '%s'", csv)
trained = sprintf("<awk -F, 'NR > 1 && $2 != \"\" {print $1 \",\" $2 \",\" $3}' '%s'", csv)
plot trained using 1:2 with lines lc rgb "#c9d6e8" title "train", \
     trained using 1:3 with lines lw 2 lc rgb "#2b6cb0" title "train, smoothed", \
     validated using 1:2 with linespoints lw 2 pt 7 ps 0.8 lc rgb "#c53030" title "validation"
