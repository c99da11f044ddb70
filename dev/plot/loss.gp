# Draws the losses of the run in DIR, from DIR/log.csv to DIR/loss.png: gnuplot -c dev/plot/loss.gp DIR
set datafile separator ","
set terminal pngcairo size 1100,650 font "sans,12"
set title ARG1."/log.csv" noenhanced
cd ARG1  # so that awk's command lines below need not quote the folder's name
set output "loss.png"
set xlabel "step"
set ylabel "loss, nats per token"
set grid
set key top right
validated = "<awk -F, 'NR > 1 && $4 != \"\" {print $1 \",\" $4}' log.csv"
trained = "<awk -F, 'NR > 1 && $2 != \"\" {print $1 \",\" $2 \",\" $3}' log.csv"
plot trained using 1:2 with lines lc rgb "#c9d6e8" title "train", \
     trained using 1:3 with lines lw 2 lc rgb "#2b6cb0" title "train, smoothed", \
     validated using 1:2 with linespoints lw 2 pt 7 ps 0.8 lc rgb "#c53030" title "validation"
