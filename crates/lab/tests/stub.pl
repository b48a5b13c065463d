#!/usr/bin/perl
# Stands in for the `whimbrel` binary: as much of its command line as the lab uses, and no more.
use strict;
use warnings;
use IO::Socket::UNIX;
use File::Basename;

my $command = join ' ', grep { !/^-/ } @ARGV[0 .. ($ARGV[0] =~ /^(agent|controller)$/ ? 0 : 1)];
my %option;
for my $i (0 .. $#ARGV - 1) {
    $option{$1} = $ARGV[$i + 1] if $ARGV[$i] =~ /^--(.*)$/;
}

sub put {
    my ($path, $text) = @_;
    open my $file, '>', $path or die "$path: $!";
    print $file $text;
    close $file;
}

if ($command eq 'pool init') {
    # Long enough to be at work still when its parent is killed.
    select undef, undef, undef, 0.1;
    mkdir $option{dir} or die "$option{dir}: $!";
    put("$option{dir}/client.toml", '');
    put("$option{dir}/socket", $option{socket});
} elsif ($command eq 'controller') {
    open my $file, '<', "$option{dir}/socket" or die;
    my $path = <$file>;
    my $server = IO::Socket::UNIX->new(Local => $path, Listen => 5) or die "$path: $!";
    while (my $client = $server->accept) { close $client }
} elsif ($command eq 'pool join-token') {
    print "token\n";
} elsif ($command eq 'agent') {
    my $again = -d $option{dir};
    die "no token\n" unless $again or ($option{join} // '') eq 'token';
    mkdir $option{dir};
    if (!fork) {
        setpgrp;
        $SIG{TERM} = 'IGNORE';
        sleep 1 while 1;
    }
    put("$option{dir}/joined", '');
    sleep 1 while 1;
} elsif ($command eq 'host list') {
    my $dir = dirname $ENV{WHIMBREL_CLIENT};
    print qq({"name":"x","state":"ready"}\n) for glob "$dir/host-*/joined";
} elsif ($command eq 'network create' or $command eq 'storage create') {
    exit 0;
} else {
    die "unexpected: @ARGV\n";
}
