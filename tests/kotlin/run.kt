// Runs the package's check on an app's folder, and shapes a picture as the package says; prints both.
import android.content.Context
import android.graphics.Bitmap
import java.io.File

fun main(arguments: Array<String>) {
    val context = Context(File(arguments[0]))
    println(ondevice.check(context))
    val side = 6
    val picture = Bitmap(side, side, IntArray(side * side) { (it shl 16) or (2 * it shl 8) or (255 - it) })
    println(ondevice.preprocess(context, picture).joinToString(" "))
}
